"""The Transformer as it was first described (Vaswani et al. 2017, arXiv 1706.03762): norms after the sums, sinusoidal
positions, ReLU, one matrix for both embeddings and the head.

No published folder has this `model_type`: `millrace train` writes it, in words after those of later encoder-decoders.
"""

from model.families.base import Family

TRANSFORMER = Family(
    name="transformer",
    architecture="TransformerForConditionalGeneration",
    prefix="",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_layers": "decoder_layers",
        "encoder_layers": "encoder_layers",
        "num_heads": "num_heads",
        "intermediate_size": "d_ff",
        "max_position": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "activation": "activation_function",
    },
    names={
        "embed": ("shared",),
        "encoder.layers.*.attn_norm": ("encoder.layers.*.self_attn_norm",),
        "encoder.layers.*.attn.qkv": (
            "encoder.layers.*.self_attn.q_proj",
            "encoder.layers.*.self_attn.k_proj",
            "encoder.layers.*.self_attn.v_proj",
        ),
        "encoder.layers.*.attn.out": ("encoder.layers.*.self_attn.out_proj",),
        "encoder.layers.*.mlp_norm": ("encoder.layers.*.feed_forward_norm",),
        "encoder.layers.*.mlp.up": ("encoder.layers.*.fc1",),
        "encoder.layers.*.mlp.down": ("encoder.layers.*.fc2",),
        "layers.*.attn_norm": ("decoder.layers.*.self_attn_norm",),
        "layers.*.attn.qkv": (
            "decoder.layers.*.self_attn.q_proj",
            "decoder.layers.*.self_attn.k_proj",
            "decoder.layers.*.self_attn.v_proj",
        ),
        "layers.*.attn.out": ("decoder.layers.*.self_attn.out_proj",),
        "layers.*.cross_norm": ("decoder.layers.*.cross_attn_norm",),
        "layers.*.cross.q": ("decoder.layers.*.cross_attn.q_proj",),
        "layers.*.cross.kv": (
            "decoder.layers.*.cross_attn.k_proj",
            "decoder.layers.*.cross_attn.v_proj",
        ),
        "layers.*.cross.out": ("decoder.layers.*.cross_attn.out_proj",),
        "layers.*.mlp_norm": ("decoder.layers.*.feed_forward_norm",),
        "layers.*.mlp.up": ("decoder.layers.*.fc1",),
        "layers.*.mlp.down": ("decoder.layers.*.fc2",),
        "head": ("lm_head",),
    },
    derived=(),
    traits={
        "norm": "layernorm",
        "position": "sinusoidal",
        "post_norm": True,
        "scaled_embedding": True,
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    defaults={"layer_norm_eps": 1e-5, "activation_function": "relu", "tie_word_embeddings": True},
)
