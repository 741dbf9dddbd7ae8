"""What a checkpoint is (`ModelConfig`) and how it is run (`EngineConfig`).

Plain data: no torch, no reading of files. A switch is here only because two released model families differ by it; the
translation from a checkpoint's own words is done in `families/`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from model.kinds import CacheNeeds, Full, Kind, combine

LONGEST_STREAM = 2**22
"""Tokens of a sequence in a network whose layers have no longest one: as far as its tables of positions reach."""


class CheckpointError(ValueError):
    """A model folder that can't be served: the message is one line naming the file, the item, found and expected."""


class EngineConfigError(ValueError):
    """A model that can't be run as asked: the message is one line naming the flag to change."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of rotary frequencies for longer contexts: `linear` divides them all by `factor`; `llama3` divides the
    low ones and blends a band (Llama 3.1 report, arXiv 2407.21783; the four numbers as in its config.json)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (arXiv 2104.09864) over the whole head, in the half-split layout of Hugging Face checkpoints."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None


Pooling = Literal["last", "mean", "cls"]
"""Which rows of a text become its one vector: the last token's, the mean of all, the first one's."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a network. Sizes are counts of numbers; `windows` has one item per layer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position: Literal["learned", "sinusoidal", "rope", "relative"] = "rope"
    rope: Rope = Rope()
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    windows: tuple[int | None, ...] = ()  # keys a layer sees, its own included; None = all; () = all in every layer
    attention: tuple[Kind, ...] = ()  # of each layer; () = full attention, or as `windows` say, in every layer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # the checkpoint's own
    encoder_layers: int = 0  # 0 = a decoder alone; else it also attends to what an encoder made of a source
    start_id: int | None = None  # of encoder-decoders: the id before the first one of an answer
    post_norm: bool = False  # norms come after the residual sums, and there is none at the end
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    scaled_scores: bool = True  # attention's scores are divided by sqrt(head_dim)
    scaled_head: bool = False  # what the head sees is divided by sqrt(hidden_size)
    relative_buckets: int = 0  # of `position` relative: kinds of distances,
    relative_distance: int = 0  # and the distance from which on all are of one kind
    role: Literal["decoder", "encoder"] = "decoder"  # an encoder's rows see the whole text, and it draws nothing
    num_segments: int = 0  # kinds of text that an encoder tells apart; one text is all of the first kind
    labels: tuple[str, ...] = ()  # what an encoder with a classifier tells apart
    pooling: Pooling = "last"  # of an embedding, where the request names none

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the network can do, as `Request.task` has it."""
        if self.encoder_layers:
            return ("generate",)
        if self.role == "decoder":
            return "generate", "embed"
        return ("embed", "classify") if self.labels else ("embed",)

    @property
    def shares_prefixes(self) -> bool:
        """Whether the keys and values of a prompt's beginning follow from its ids alone, so that requests can share
        them. Behind a cross-attention they follow from the source too."""
        return not self.encoder_layers

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, None for full attention."""
        return self.windows[layer] if self.windows else None

    def kind(self, layer: int) -> Kind:
        """How a layer mixes tokens."""
        return self.attention[layer] if self.attention else Full()

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Layers whose keys and values are in cache blocks."""
        return tuple(i for i in range(self.num_layers) if self.kind(i).is_cached)

    @property
    def cache_needs(self) -> CacheNeeds:
        """Of all layers together: a block holds a token's keys and values of every layer."""
        return combine(kind.needs() for kind in self.attention) if self.attention else CacheNeeds()

    @property
    def attention_half(self) -> float:
        """The position at which a token's attention takes as many operations as all of its products with weights, the
        head left out; infinite where no layer looks back to the beginning."""
        num_full = sum(self.kind(i).is_full and self.window(i) is None for i in range(self.num_layers))
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.hidden_size * (2 * heads + 2 * kv_heads + (3 if self.gated_mlp else 2) * self.intermediate_size)
        return self.num_layers * weights / (2 * heads * num_full) if num_full else math.inf

    @property
    def searches(self) -> bool:
        """Whether several beginnings of one answer can share what they have in common, which beams do."""
        return not self.attention

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        endless = self.attention and not any(kind.is_full for kind in self.attention)
        return LONGEST_STREAM if endless else self.max_position


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says about a request that doesn't; neutral where it is silent. The ids that end a
    sequence are not here: `ModelConfig.eos_ids` holds those of both files."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run. `num_blocks` is decided when the cache is sized; 0 = not yet."""

    device: str = "cpu"
    dtype: str = "float32"  # of activations, the cache, and weights that are not quantised
    max_model_len: int = 1024  # tokens of prompt and output together
    max_num_seqs: int = 64  # sequences computed in one step
    max_batch_tokens: int = 512  # tokens computed in one step: prompts are cut into chunks that fit
    block_size: int = 16  # tokens of one cache block
    num_blocks: int = 0
    prefix_cache: bool = True  # keys and values of a common beginning are computed once
    native: bool = True  # on a CPU: a step in one call of the native core, where it was built
    quantize: str = "none"  # or "int8": weights of linear layers, one byte each
    deterministic: bool = False  # in 16 bits and on a GPU: slower products whose rows don't depend on the batch
    needs: CacheNeeds = CacheNeeds()  # which of a sequence's tokens stay in blocks: the network's own
    attention_half: float = math.inf  # also the network's own: see `ModelConfig`

    @property
    def number_format(self) -> str:
        """What a network computes in, in one word: engines of another one don't give the same texts."""
        return self.dtype if self.quantize == "none" else f"{self.dtype}-{self.quantize}"
