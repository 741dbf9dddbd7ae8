"""Qwen3, the dense sizes (arXiv 2505.09388): queries and keys are normed per head, biases are a switch."""

from dataclasses import replace

from model.families.qwen2 import QWEN2

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    names={
        **QWEN2.names,
        "layers.*.attn.q_norm": ("model.layers.*.self_attn.q_norm",),
        "layers.*.attn.k_norm": ("model.layers.*.self_attn.k_norm",),
    },
    traits={"qk_norm": True},
    defaults={**QWEN2.defaults, "head_dim": 128},
    switches={"attention_bias": ("qkv_bias", "out_bias")},
)
