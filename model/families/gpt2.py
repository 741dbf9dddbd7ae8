"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, plain GELU MLPs, biases everywhere.

Its projections are stored [in, out]: the published code multiplies from the left.
"""

from model.families.base import Family

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
    },
    names={
        "embed": ("transformer.wte",),
        "positions": ("transformer.wpe",),
        "layers.*.attn_norm": ("transformer.h.*.ln_1",),
        "layers.*.attn.qkv": ("transformer.h.*.attn.c_attn",),
        "layers.*.attn.out": ("transformer.h.*.attn.c_proj",),
        "layers.*.mlp_norm": ("transformer.h.*.ln_2",),
        "layers.*.mlp.up": ("transformer.h.*.mlp.c_fc",),
        "layers.*.mlp.down": ("transformer.h.*.mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    derived=(r"h\.\d+\.attn\.(masked_)?bias",),
    traits={
        "norm": "layernorm",
        "position": "learned",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    transposed=frozenset({"layers.*.attn.qkv", "layers.*.attn.out", "layers.*.mlp.up", "layers.*.mlp.down"}),
)
