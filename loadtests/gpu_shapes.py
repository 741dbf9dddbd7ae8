"""Random checkpoints in the shapes of known models, made on the device: what a GPU is measured with.

Speed does not depend on what weights say, so nothing is downloaded or written.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from model.cache.store import bytes_per_block
from model.config import EngineConfig, ModelConfig, Rope
from model.engine.engine import Engine
from model.nn.decoder import Decoder, as_dtype, num_parameters
from model.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"

TINY = ModelConfig(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position=16_384,
)
QWEN3_0_6B = ModelConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    max_position=16_384,
    rope=Rope(theta=1e6),
    qk_norm=True,
)
LLAMA_1_1B = ModelConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=2048,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=5632,
    max_position=16_384,
    tied_head=False,
)
LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    max_position=16_384,
    rope=Rope(theta=500_000.0),
    tied_head=False,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A named shape, and the (streams, context) points at which its decoding is measured."""

    name: str
    config: ModelConfig
    points: tuple[tuple[int, int], ...]


SHAPES = (
    Shape("8B", LLAMA_8B, ((1, 128), (1, 8192), (8, 1024), (64, 128), (64, 1024), (256, 256))),
    Shape("1.1B", LLAMA_1_1B, ((1, 128), (8, 1024), (64, 1024), (256, 1024))),
    Shape("0.6B", QWEN3_0_6B, ((1, 128), (1, 8192), (8, 1024), (64, 1024), (256, 1024))),
)
TINY_SHAPES = (Shape("tiny", TINY, ((1, 16), (3, 40))),)


def random_decoder(config: ModelConfig, dtype: str, device: torch.device) -> Decoder:
    """Weights of the size that trained ones start with."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(as_dtype(dtype))
    try:
        with device:
            decoder = Decoder(config).to(device).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return decoder


def make_engine(decoder: Decoder, device: str, num_seqs: int, length: int, room: int, fixed: bool = False) -> Engine:
    """An engine for `num_seqs` sequences of up to `length` tokens each and about `room` together."""
    config = EngineConfig(
        device=device,
        dtype=str(decoder.embed.weight.dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_seqs=num_seqs,
        max_batch_tokens=2048,
        num_blocks=room // 16 + num_seqs,
        deterministic=fixed,
        prefix_cache=False,  # prompts are drawn again and again
    )
    return Engine(decoder, Tokenizer.load(BUNDLED), config)


def read_bytes(decoder: Decoder, num_streams: int, context: int) -> int:
    """The fewest bytes that one decoding step reads: every weight once (of an embedding that is not the head's, only
    a row for each stream), and the keys and values of every context."""
    config, item = decoder.config, decoder.embed.weight.dtype.itemsize
    numbers = num_parameters(decoder)
    if not config.tied_head:
        numbers -= config.vocab_size * config.hidden_size
    cache = num_streams * context * bytes_per_block(config, 1, decoder.embed.weight.dtype)
    return numbers * item + cache
