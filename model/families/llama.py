"""Llama 1 to 3.3 (arXiv 2302.13971, 2407.21783) and the many checkpoints of that shape."""

from model.families.base import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
        "max_position": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
    },
    names={
        "embed": ("model.embed_tokens",),
        "layers.*.attn_norm": ("model.layers.*.input_layernorm",),
        "layers.*.attn.qkv": (
            "model.layers.*.self_attn.q_proj",
            "model.layers.*.self_attn.k_proj",
            "model.layers.*.self_attn.v_proj",
        ),
        "layers.*.attn.out": ("model.layers.*.self_attn.o_proj",),
        "layers.*.mlp_norm": ("model.layers.*.post_attention_layernorm",),
        "layers.*.mlp.up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
        "layers.*.mlp.down": ("model.layers.*.mlp.down_proj",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    },
    derived=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu"},
    switches={"attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": ("mlp_bias",)},
)
