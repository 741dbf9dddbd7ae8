"""T5 (arXiv 1910.10683) with a plain ReLU MLP, and T5 1.1 (arXiv 2002.05202) with a gated GELU and a head of its own:
an encoder-decoder with relative positions, RMSNorm, no biases and unscaled scores."""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from model.families.base import Family


@dataclass(frozen=True, slots=True)
class _T5(Family):
    """Two facts stand in its config.json between the lines: whether the MLP is gated, and whether the head is scaled.
    The second was true of tied heads only, until newer folders began to name it."""

    def read_config(self, raw: Mapping[str, object], source: str = "config.json") -> ModelConfig:
        """See `Family`."""
        word = raw.get("feed_forward_proj", self.defaults["feed_forward_proj"])
        told = {
            "is_gated_act": isinstance(word, str) and word.startswith("gated-"),
            "scale_decoder_outputs": raw.get("tie_word_embeddings") is not False,
        }
        return Family.read_config(self, {**told, **raw}, source)


T5 = _T5(
    name="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_layers": "num_decoder_layers",
        "encoder_layers": "num_layers",
        "num_heads": "num_heads",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "max_position": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "feed_forward_proj",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_distance": "relative_attention_max_distance",
    },
    names={
        "embed": ("shared",),
        "encoder.relative": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",),
        "encoder.layers.*.attn_norm": ("encoder.block.*.layer.0.layer_norm",),
        "encoder.layers.*.attn.qkv": (
            "encoder.block.*.layer.0.SelfAttention.q",
            "encoder.block.*.layer.0.SelfAttention.k",
            "encoder.block.*.layer.0.SelfAttention.v",
        ),
        "encoder.layers.*.attn.out": ("encoder.block.*.layer.0.SelfAttention.o",),
        "encoder.layers.*.mlp_norm": ("encoder.block.*.layer.1.layer_norm",),
        "encoder.layers.*.mlp.up": (
            "encoder.block.*.layer.1.DenseReluDense.wi_0",
            "encoder.block.*.layer.1.DenseReluDense.wi_1",
        ),
        "encoder.layers.*.mlp.down": ("encoder.block.*.layer.1.DenseReluDense.wo",),
        "encoder.norm": ("encoder.final_layer_norm",),
        "relative": ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias",),
        "layers.*.attn_norm": ("decoder.block.*.layer.0.layer_norm",),
        "layers.*.attn.qkv": (
            "decoder.block.*.layer.0.SelfAttention.q",
            "decoder.block.*.layer.0.SelfAttention.k",
            "decoder.block.*.layer.0.SelfAttention.v",
        ),
        "layers.*.attn.out": ("decoder.block.*.layer.0.SelfAttention.o",),
        "layers.*.cross_norm": ("decoder.block.*.layer.1.layer_norm",),
        "layers.*.cross.q": ("decoder.block.*.layer.1.EncDecAttention.q",),
        "layers.*.cross.kv": (
            "decoder.block.*.layer.1.EncDecAttention.k",
            "decoder.block.*.layer.1.EncDecAttention.v",
        ),
        "layers.*.cross.out": ("decoder.block.*.layer.1.EncDecAttention.o",),
        "layers.*.mlp_norm": ("decoder.block.*.layer.2.layer_norm",),
        "layers.*.mlp.up": (
            "decoder.block.*.layer.2.DenseReluDense.wi_0",
            "decoder.block.*.layer.2.DenseReluDense.wi_1",
        ),
        "layers.*.mlp.down": ("decoder.block.*.layer.2.DenseReluDense.wo",),
        "norm": ("decoder.final_layer_norm",),
        "head": ("lm_head",),
    },
    plain={
        "encoder.layers.*.mlp.up": ("encoder.block.*.layer.1.DenseReluDense.wi",),
        "layers.*.mlp.up": ("decoder.block.*.layer.2.DenseReluDense.wi",),
    },
    # Copies of the embedding, and a bias of cross-attention that the published code never used.
    derived=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    traits={"position": "relative", "scaled_scores": False},
    defaults={
        "n_positions": 512,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
    switches={"is_gated_act": ("gated_mlp",), "scale_decoder_outputs": ("scaled_head",)},
    activations={"relu": "relu", "gated-gelu": "gelu_tanh", "gated-silu": "silu"},
)
