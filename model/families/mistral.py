"""Mistral 7B (arXiv 2310.06825): Llama's shape, no biases, and a window on every layer."""

from dataclasses import replace

from model.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
    switches={},
    only={"attention_bias": False, "mlp_bias": False},
    sliding="all",
)
