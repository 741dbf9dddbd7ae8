"""Every Triton kernel against its plain PyTorch twin: odd head sizes, block edges, windows, long contexts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.fast import FastRunner
from model.nn.attention import PagedAttention
from model.nn.norm import RMSNorm
from model.nn.ops import Heads
from model.nn.positions import Rotary
from model.nn.quantized import linear_scaled, quantize_weight
from tests.model.conftest import TINY, MakeEngine, random_decoder
from tests.model.helpers_kernels import DEVICE, NEEDS_TRITON
from tests.model.test_engine import mixed_requests, outputs

pytestmark = [NEEDS_TRITON, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]
if not NEEDS_TRITON.args[0]:
    from model.nn.kernels.check import disagreement
    from model.nn.kernels.linear import linear
    from model.nn.kernels.ops import KernelOps
    from tests.model.helpers_ragged import Cache, ragged

ROOT = Path(__file__).parents[2]
# The interpreter cuts where a GPU rounds to bfloat16, and knows no product of such numbers.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


DOT_DTYPES = [dtype for dtype in TOLERANCE if DEVICE.type == "cuda" or dtype != torch.bfloat16]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def idle(config: ModelConfig = TINY, fixed: bool = False) -> "KernelOps":
    """The row-wise kernels need no batch."""
    cache = Cache(config, 1, 16)
    return KernelOps(config, cache.store, ragged(cache, {0: (0, 1)}), fixed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 48, 128, 700])
def test_residual_and_norm(size: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(size, 1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(draw(size, dtype=dtype))
    x, update = draw(3, size, dtype=dtype), draw(4, size, dtype=dtype)[1:]
    for added in (update, None):
        summed, normed = idle().add_norm(x, added, norm)
        expected = x if added is None else x + added
        assert error(summed, expected) < TOLERANCE[dtype]
        assert error(normed, norm(expected)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gate(dtype: torch.dtype) -> None:
    h = draw(3, 2 * 1500, dtype=dtype) * 3
    gate, up = h.chunk(2, dim=-1)
    assert error(idle().gate(h, "silu"), F.silu(gate) * up) < TOLERANCE[dtype]
    assert torch.equal(idle().gate(h, "relu"), F.relu(gate) * up)  # no kernel: the plain way


@pytest.mark.parametrize(("rows", "columns", "deep"), [(1, 40, 70), (65, 33, 64), (3, 7, 200)])
def test_fixed_linear(rows: int, columns: int, deep: int) -> None:
    x, weight, bias = draw(rows, deep), draw(columns, deep), draw(columns)
    assert error(linear(x, weight, None), F.linear(x, weight)) < 1e-5
    assert error(linear(x, weight, bias), F.linear(x, weight, bias)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "deep"), [(1, 40, 70), (16, 64, 128), (65, 33, 200)])
def test_int8_linear(rows: int, columns: int, deep: int, dtype: torch.dtype) -> None:
    x, bias = draw(rows, deep, dtype=dtype), draw(columns, dtype=dtype)
    weight = quantize_weight(draw(columns, deep))
    for fixed in (False, True):
        ops = idle(fixed=fixed)
        assert error(ops.linear(x, weight), linear_scaled(x, weight)) < TOLERANCE[dtype]
        assert error(ops.linear(x, weight, bias), linear_scaled(x, weight, bias)) < TOLERANCE[dtype]


def test_rows_of_the_fixed_linear_do_not_depend_on_their_number() -> None:
    x, weight = draw(130, 96), draw(50, 96)
    whole = linear(x, weight, None)
    assert all(torch.equal(linear(x[:n], weight, None), whole[:n]) for n in (1, 2, 7, 64, 65))
    narrow, ops = quantize_weight(weight), idle(fixed=True)
    whole = ops.linear(x, narrow)
    assert all(torch.equal(ops.linear(x[:n], narrow), whole[:n]) for n in (1, 2, 7, 64, 65))


HEAD_SIZES = [(4, 2, 8), (4, 4, 3), (6, 2, 20), (3, 1, 64), (9, 3, 80), (2, 1, 128)]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), HEAD_SIZES)
def test_projections_to_queries_and_cache(num_heads: int, num_kv_heads: int, dim: int, normed: bool) -> None:
    config = replace(TINY, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim)
    cache = Cache(config, 2, 40)
    batch = ragged(cache, {0: (0, 5), 1: (30, 4)}, num_padding=2)
    norm = RMSNorm(dim, 1e-6).to(DEVICE).requires_grad_(False) if normed else None
    turn = Rotary(config.rope, dim, 64).to(DEVICE)(batch.positions, torch.float32) if dim % 2 == 0 else None
    heads = Heads(draw(11, num_heads + 2 * num_kv_heads, dim), num_heads, num_kv_heads, norm, norm, turn)
    before = cache.store.keys.clone()
    queries = KernelOps(config, cache.store, batch)._finish(1, heads)
    q, k, v = heads.finish()
    assert error(queries, q) < 1e-5
    keys, values = (
        c[1].flatten(1, 2)[:, batch.slots[:9]].transpose(0, 1) for c in (cache.store.keys, cache.store.values)
    )
    assert error(keys, k[:9]) < 1e-5
    assert torch.equal(values, v[:9])
    assert torch.equal(cache.store.keys[0], before[0])
    assert (cache.store.keys[1] != before[1]).any(-1).any(0).sum() == 9  # slots: padding writes none


Chunks = dict[int, tuple[int, int]]
CONTEXTS: dict[str, Chunks] = {
    "first-tokens": {0: (0, 1), 1: (0, 1)},
    "block-edges": {0: (15, 1), 1: (16, 1), 2: (31, 1), 3: (63, 1), 4: (64, 1)},
    "span-edges": {0: (255, 1), 1: (256, 1), 2: (257, 1)},
    "long": {0: (900, 1), 1: (3, 1)},
    "chunks": {0: (0, 34), 1: (60, 9), 2: (250, 9)},
    "mixed": {0: (300, 1), 1: (0, 33), 2: (17, 1), 3: (400, 9)},
}


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("chunks", CONTEXTS.values(), ids=CONTEXTS)
def test_attention(chunks: Chunks, window: int | None) -> None:
    config = replace(TINY, num_heads=6, num_kv_heads=2, head_dim=20, windows=(None, window))
    check_attention(config, chunks, torch.float32)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), HEAD_SIZES)
def test_attention_of_head_sizes_and_dtypes(num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    config = replace(TINY, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim)
    check_attention(config, {0: (70, 1), 1: (100, 30)}, dtype)


def check_attention(config: ModelConfig, chunks: Chunks, dtype: torch.dtype) -> None:
    """Kernels against `PagedAttention` in float32 on the same cache; what lies beyond a sequence is poisoned."""
    cache = Cache(config, len(chunks), max(start + num for start, num in chunks.values()), dtype)
    batch = ragged(cache, chunks)
    n = len(batch.token_ids)
    heads = Heads(
        draw(n, config.num_heads + 2 * config.num_kv_heads, config.head_dim, dtype=dtype),
        config.num_heads, config.num_kv_heads, None, None, None,
    )  # fmt: skip
    plain = cache.as_float32()
    wide = replace(heads, qkv=heads.qkv.float())
    expected = PagedAttention(config, plain, cache.forward_batch(chunks)).attend(1, wide)
    cache.poison_beyond(chunks)
    got = KernelOps(config, cache.store, batch).attend(1, heads)
    assert error(got, expected) < TOLERANCE[dtype]


def test_a_row_does_not_depend_on_its_chunk_or_mates() -> None:
    """Alone, at the end of any chunk, among others: the same bits."""
    config = replace(TINY, num_heads=4, num_kv_heads=2, head_dim=16)
    cache = Cache(config, 3, 400)
    qkv = draw(400, 8, 16)

    def last_row(chunks: Chunks) -> Tensor:
        rows = torch.cat([qkv[start : start + num] for start, num in cache.in_order(chunks)])
        heads = Heads(rows, 4, 2, None, None, None)
        batch = ragged(cache, chunks)
        mixed = KernelOps(config, cache.store, batch).attend(0, heads)
        return mixed[cache.last_row(chunks, 0)]

    last_row({0: (0, 300)})  # all of the sequence's keys are in the cache from here on
    alone = last_row({0: (299, 1)})
    for chunks in ({0: (299, 1), 1: (350, 1), 2: (0, 3)}, {0: (298, 2)}, {0: (260, 40), 1: (10, 1)}):
        assert error(last_row(chunks), alone) < 1e-6


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """Hopper, within its shared memory. In a process of its own, for here they are interpreted."""
    command = [sys.executable, "-m", "tests.model.compile_kernels", "90"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("sm_90") == 18


@pytest.mark.parametrize("changes", [{}, {"windows": (20, None), "qk_norm": True}, {"position": "learned"}])
def test_kernels_agree_with_their_twins_here(changes: dict[str, Any]) -> None:
    """The check that is made when a network is loaded on a GPU."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    assert disagreement(replace(TINY, **changes), DEVICE, dtype) is None


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.nn.kernels.ops._scale", lambda dim: 0.1)
    reason = disagreement(TINY, DEVICE, torch.float32)
    assert reason is not None and "attention" in reason


def test_the_engine_over_kernels_gives_the_tokens_of_the_plain_one(make_engine: MakeEngine) -> None:
    """The fast runner with everything in it; on a GPU with graphs, on a CPU interpreted."""
    requests, decoder = mixed_requests(5, max_prompt=20), random_decoder(TINY)
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=5)) for r in requests]
    expected = outputs(make_engine(decoder), requests)
    config = EngineConfig(device=DEVICE.type, max_model_len=512, num_blocks=256, max_num_seqs=4, max_batch_tokens=20)
    decoder = decoder.to(DEVICE)
    record = None if DEVICE.type == "cuda" else lambda step: step
    runner = FastRunner(decoder, config, KernelOps, record)
    assert outputs(Engine(decoder, make_engine().tokenizer, config, runner), requests) == expected
