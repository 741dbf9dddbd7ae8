"""BERT (arXiv 1810.04805): an encoder with learned positions, segments, and a norm after each half of a layer.

The heads that it was pre-trained with are passed over: they serve neither an embedding nor a label, and the pooler
serves labels only. Old folders call a norm's numbers gamma and beta.
"""

from model.families.base import Family

BERT = Family(
    name="bert",
    architecture="BertModel",
    classifier="BertForSequenceClassification",
    prefix="bert.",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_position": "max_position_embeddings",
        "num_segments": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
    },
    names={
        "embed": ("bert.embeddings.word_embeddings",),
        "positions": ("bert.embeddings.position_embeddings",),
        "segments": ("bert.embeddings.token_type_embeddings",),
        "embed_norm": ("bert.embeddings.LayerNorm",),
        "layers.*.attn.qkv": (
            "bert.encoder.layer.*.attention.self.query",
            "bert.encoder.layer.*.attention.self.key",
            "bert.encoder.layer.*.attention.self.value",
        ),
        "layers.*.attn.out": ("bert.encoder.layer.*.attention.output.dense",),
        "layers.*.attn_norm": ("bert.encoder.layer.*.attention.output.LayerNorm",),
        "layers.*.mlp.up": ("bert.encoder.layer.*.intermediate.dense",),
        "layers.*.mlp.down": ("bert.encoder.layer.*.output.dense",),
        "layers.*.mlp_norm": ("bert.encoder.layer.*.output.LayerNorm",),
        "pooler": ("bert.pooler.dense",),
        "classifier": ("classifier",),
        "head": ("cls.predictions.decoder",),
    },
    derived=(r"embeddings\.position_ids", r"cls\..*", r"pooler\.dense\.(weight|bias)"),
    traits={
        "role": "encoder",
        "norm": "layernorm",
        "position": "learned",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "pooling": "mean",
    },
    defaults={
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
    },
    only={
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "problem_type": "single_label_classification",
    },
    aliases={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
)
