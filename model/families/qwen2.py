"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values; windows on upper layers."""

from dataclasses import replace

from model.families.llama import LLAMA

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    traits={"qkv_bias": True},
    defaults={**LLAMA.defaults, "sliding_window": 4096, "max_window_layers": 28},
    switches={},
    only={"mlp_bias": False},
    sliding="some",
)
