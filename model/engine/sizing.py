"""How a model is run on this machine: device, dtype, and how many cache blocks fit beside everything else.

Every refusal is one line that says what is missing and which flag changes it.
"""

import os
from dataclasses import replace

import torch

from model.cache import cross, states
from model.cache.store import bytes_per_block
from model.config import EngineConfig, EngineConfigError, ModelConfig
from model.engine.reach import Reach
from model.nn.batch import TILE
from model.nn.decoder import as_dtype

GIB = 2**30
HOST_SHARE = 0.4  # of the machine's memory: weights, cache and everything else on a CPU
HOST_BATCH_TOKENS, DEVICE_BATCH_TOKENS = 512, 2048  # of one step: enough to be busy, few enough for others to wait
QUANTIZE = ("none", "int8")
DEVICE_SHARE = 0.92  # of a GPU's free memory


def choose_device(name: str) -> str:
    """`auto` is CUDA where there is one. Raises `EngineConfigError` for a GPU that isn't there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineConfigError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or install a CUDA build")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def choose_dtype(name: str, device: str, checkpoint: str) -> str:
    """`auto` is the checkpoint's own on CUDA and float32 on CPU, where results are exact to the bit."""
    return name if name != "auto" else checkpoint if device == "cuda" else "float32"


def check_quantize(name: str) -> None:
    """Raises `EngineConfigError` for a way of quantising that there isn't."""
    if name not in QUANTIZE:
        raise EngineConfigError(f"--quantize {name}: expected one of {', '.join(QUANTIZE)}")


def size_engine(
    config: ModelConfig,
    *,
    device: str,
    dtype: str,
    quantize: str = "none",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_batch_tokens: int | None = None,
    cache_gib: float | None = None,
) -> EngineConfig:
    """An engine configuration whose cache fits: `cache_gib` if given, else what all seats can use, within memory."""
    length = max_model_len or config.max_position
    if length > config.longest:
        raise EngineConfigError(
            f"--max-model-len {length}: the checkpoint's positions end at {config.longest}; use at most that"
        )
    tokens = max_batch_tokens or (DEVICE_BATCH_TOKENS if device == "cuda" else HOST_BATCH_TOKENS)
    engine = EngineConfig(device, dtype, length, max_num_seqs, max(tokens, max_num_seqs), quantize=quantize)
    if config.role == "encoder":
        return replace(engine, max_batch_tokens=max(engine.max_batch_tokens, length))
    engine = with_needs(engine, config)
    per_block = bytes_per_block(config, engine.block_size, as_dtype(dtype))
    reach = Reach(engine.needs, engine.block_size)
    num_least = reach.num_needed(length)
    if not num_least:
        return engine
    if cache_gib is None:
        wanted = max_num_seqs * min(reach.num_places(length), reach.num_wanted(length, tokens)) * per_block
        room = _free_bytes(config, engine)
        where = f"{room / GIB:.2f} GiB are left for the cache"
    else:
        wanted = room = int(cache_gib * GIB)
        where = f"--cache-gib {cache_gib:g}"
    num_blocks = min(wanted, room) // per_block
    if num_blocks < num_least:
        needed = min(length, num_least * engine.block_size)
        raise EngineConfigError(
            f"{where}: that holds {max(num_blocks, 0) * engine.block_size} tokens, one sequence may need "
            f"{needed}; use --max-model-len {max(num_blocks * engine.block_size, 1)} or less, "
            f"or --cache-gib {needed * per_block / engine.block_size / GIB:.3f} or more"
        )
    return replace(engine, num_blocks=num_blocks)


def with_needs(engine: EngineConfig, config: ModelConfig) -> EngineConfig:
    """The engine's configuration for this network: which tokens stay in blocks, no sharing of what can't be, and what
    a long context costs."""
    needs = config.cache_needs
    shares = engine.prefix_cache and needs.is_shareable and config.shares_prefixes
    return replace(engine, needs=needs, prefix_cache=shares, attention_half=config.attention_half)


def peak_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    """Bytes that one full step needs beside weights and cache: the widest layer's rows, attention over one tile for
    every row, the logits of every seat in float32 (with the copies that sampling makes), and what lives in slots."""
    item, rows = as_dtype(engine.dtype).itemsize, engine.max_batch_tokens
    wide = config.intermediate_size * (3 if config.gated_mlp else 2)
    heads = config.num_heads * config.head_dim
    layer = rows * item * (4 * config.hidden_size + max(wide, 6 * heads))
    attention = rows * config.num_heads * 4 * (3 * TILE + 3 * config.head_dim)
    gathered = 2 * engine.max_num_seqs * TILE * config.num_kv_heads * config.head_dim * item
    logits = engine.max_num_seqs * config.vocab_size * 4 * 5
    slot = cross.bytes_per_slot(config, engine.max_model_len, as_dtype(engine.dtype)) + states.bytes_per_slot(config)
    # A GPU's kernels split each sequence's keys into at most 32 spans and keep a result of each for every head.
    spans = engine.max_num_seqs * config.num_heads * 32 * (config.head_dim + 2) * 4 if engine.device == "cuda" else 0
    return layer + attention + gathered + logits + spans + engine.max_num_seqs * slot


def _free_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    if engine.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free * DEVICE_SHARE) - peak_bytes(config, engine)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(memory * HOST_SHARE) - peak_bytes(config, engine) - _weight_bytes(config, engine)


def _weight_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    # On a GPU the weights are loaded before the cache is sized and so are gone from its free memory already.
    heads = (config.num_heads * 2 + config.num_kv_heads * 2) * config.head_dim
    mlp = config.intermediate_size * (3 if config.gated_mlp else 2)
    numbers = config.num_layers * config.hidden_size * (heads + mlp)
    numbers += config.vocab_size * config.hidden_size
    item = as_dtype(engine.dtype).itemsize
    embedding = 0 if config.tied_head else config.vocab_size * config.hidden_size * item
    return numbers * (item if engine.quantize == "none" else 1) + embedding
