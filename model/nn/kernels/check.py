"""Do the kernels compute on this very device what their plain twins compute? Asked once, when a network is loaded.

Compilers and drivers have bugs that tests elsewhere can't find; a wrong kernel would show as slightly worse text, which
nobody would trace back. Small shapes, but the network's own head sizes, dtype and windows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from model.cache.store import PagedStore
from model.config import ModelConfig
from model.nn.attention import PagedAttention
from model.nn.batch import TILE, AttentionGroup, ForwardBatch, RaggedBatch, piece_rows
from model.nn.kernels.ops import KernelOps
from model.nn.norm import RMSNorm
from model.nn.ops import Heads, Ops
from model.nn.positions import Rotary
from model.nn.quantized import linear_scaled, quantize_weight

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SIZE, PAST, NEW = 16, 300, 20  # of one sequence: tokens in the cache, tokens of a chunk that follows
SPAN = 256


@torch.inference_mode()
def disagreement(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels, in one line; None if nothing is."""
    narrow = replace(config, num_layers=1, windows=(config.window(0),))
    try:
        for num in (1, NEW):
            found, expected = _attend(narrow, device, dtype, num)
            error = _distance(found, expected)
            if not error < TOLERANCE[dtype]:
                return f"attention of {num} rows is off by {error:.1e}"
        for name, found, expected in _rows(narrow, device, dtype):
            if not _distance(found, expected) < TOLERANCE[dtype]:
                return f"{name} is off by {_distance(found, expected):.1e}"
    except Exception as error:  # whatever a compiler or driver raises: the plain path still works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _attend(config: ModelConfig, device: torch.device, dtype: torch.dtype, num: int) -> tuple[Tensor, Tensor]:
    """The kernels' mixed values and, in float32, the twin's, for the last `num` tokens of a sequence."""
    length = PAST + num
    store = PagedStore(config, -(-length // TILE) * TILE // SIZE, SIZE, device, dtype)
    random = torch.Generator(device).manual_seed(0)
    store.keys.normal_(generator=random)
    store.values.normal_(generator=random)
    wide = PagedStore(config, store.num_blocks, SIZE, device, torch.float32)
    wide.keys.copy_(store.keys)
    wide.values.copy_(store.values)
    total = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.randn(num, total, config.head_dim, generator=random, device=device).to(dtype)
    positions = torch.arange(PAST, length, device=device)
    blocks = torch.arange(store.num_blocks, device=device).flip(0)
    slots = blocks[positions // SIZE] * SIZE + positions % SIZE
    ids, tiles = torch.zeros_like(positions), -(-length // TILE)
    group = AttentionGroup(torch.arange(num, device=device)[None], blocks[None], (1,) * tiles, PAST)
    plain = PagedAttention(config, wide, ForwardBatch(ids, positions, num, slots, (group,), ids[:0], 1))
    width = piece_rows(config.num_heads, config.num_kv_heads)
    pieces = [[0, at, min(width, num - at), PAST + at] for at in range(0, num if num > 1 else 0, width)]
    batch = RaggedBatch(
        ids, positions, slots, ids, int(num == 1), torch.tensor(pieces, dtype=torch.int32, device=device),
        blocks[None].int(), SPAN, -(-length // SPAN),
    )  # fmt: skip
    finish: tuple[Ops, torch.dtype] = (KernelOps(config, store, batch), dtype)
    return tuple(
        ops.attend(0, _heads(config, qkv.to(kind), positions, device)) for ops, kind in (finish, (plain, torch.float32))
    )  # type: ignore[return-value]


def _heads(config: ModelConfig, qkv: Tensor, positions: Tensor, device: torch.device) -> Heads:
    norm = RMSNorm(config.head_dim, config.norm_eps).to(device, qkv.dtype) if config.qk_norm else None
    angles = None
    if config.position == "rope":
        angles = Rotary(config.rope, config.head_dim, PAST + NEW).to(device)(positions, qkv.dtype)
    return Heads(qkv, config.num_heads, config.num_kv_heads, norm, norm, angles)


def _rows(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """Names, results and twins' results of the kernels that treat rows by themselves."""
    store = PagedStore(config, 1, SIZE, device, dtype)
    none = torch.empty(0, dtype=torch.int64, device=device)
    ops = KernelOps(config, store, RaggedBatch(none, none, none, none, 0, none, none[None], SPAN, 1))
    x = torch.randn(3, config.hidden_size, device=device, dtype=dtype)
    h = torch.randn(3, 2 * config.intermediate_size, device=device, dtype=dtype)
    norm = RMSNorm(config.hidden_size, config.norm_eps).to(device, dtype)
    weight = torch.randn(40, config.hidden_size, device=device, dtype=dtype)
    fixed = KernelOps(config, store, ops.batch, fixed=True)
    narrow = quantize_weight(weight)
    return [
        ("the norm", ops.add_norm(x, x, norm)[1], Ops.add_norm(ops, x, x, norm)[1]),
        ("the gate", ops.gate(h, config.activation), Ops.gate(ops, h, config.activation)),
        ("the fixed product", fixed.linear(x, weight), Ops.linear(ops, x, weight)),
        ("the product with int8", ops.linear(x, narrow), linear_scaled(x, narrow)),
    ]


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected; NaN where anything is."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
