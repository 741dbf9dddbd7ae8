"""Triton kernels that treat each row by itself: residual + RMSNorm, gate, and the way from projections to the cache.

Each has a plain twin, named in its docstring. Sums and products are done in float32 and rounded where the twin rounds,
but for the turn by a position, which is rounded once only. Nothing here chooses anything: whoever
calls has made sure that shapes fit. Sizes that are powers of two (`*_PAD`) cover those that need not be.
"""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(x, update, weight, summed, normed, eps, SIZE: tl.constexpr, PAD: tl.constexpr, ADD: tl.constexpr):
    """One row of `Ops.add_norm` with an RMSNorm: summed = x + update (if ADD), normed = its norm."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    real = at < SIZE
    dtype = x.dtype.element_ty
    wide = tl.load(x + row * SIZE + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        total = (wide + tl.load(update + row * SIZE + at, mask=real, other=0.0).to(tl.float32)).to(dtype)
        tl.store(summed + row * SIZE + at, total, mask=real)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    rounded = (wide * scale).to(dtype).to(tl.float32)
    out = tl.load(weight + at, mask=real, other=0.0).to(tl.float32) * rounded
    tl.store(normed + row * SIZE + at, out.to(dtype), mask=real)


@triton.jit
def silu_gate(h, out, SIZE: tl.constexpr, STEP: tl.constexpr):
    """STEP numbers of one row of `Ops.gate` with SiLU: h [n, 2 * SIZE] -> out [n, SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    real = at < SIZE
    gate = tl.load(h + row * 2 * SIZE + at, mask=real, other=0.0)
    up = tl.load(h + row * 2 * SIZE + SIZE + at, mask=real, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * SIZE + at, (silu * up).to(gate.dtype), mask=real)


@triton.jit
def finish_heads(
    qkv,
    queries,
    keys,
    values,
    slots,
    cos,
    sin,
    q_weight,
    k_weight,
    eps,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
):
    """One head of one row of `Heads.finish`, and the cache write: queries go to `queries` [n, heads, d], keys and
    values straight to their slot in the cache [kv_heads, slots, d] (`head_stride` numbers from head to head). A row
    whose slot is below 0 is not real and writes nothing there."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    FIRST: tl.constexpr = (DIM + 1) // 2  # rotary positions pair number i with number i + d / 2
    low = tl.arange(0, HALF_PAD)
    high = low + FIRST
    in_low, in_high = low < FIRST, high < DIM
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * DIM
    a = tl.load(source + low, mask=in_low, other=0.0)
    b = tl.load(source + high, mask=in_high, other=0.0)
    slot = tl.load(slots + row).to(tl.int64)
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    if head < NUM_HEADS + NUM_KV_HEADS:
        if NORM:
            weight_a = tl.load(k_weight + low, mask=in_low, other=0.0)
            weight_b = tl.load(k_weight + high, mask=in_high, other=0.0)
            if is_query:
                weight_a = tl.load(q_weight + low, mask=in_low, other=0.0)
                weight_b = tl.load(q_weight + high, mask=in_high, other=0.0)
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            scale = tl.rsqrt((tl.sum(wide_a * wide_a) + tl.sum(wide_b * wide_b)) / DIM + eps)
            wide_a = (wide_a * scale).to(a.dtype).to(tl.float32)
            wide_b = (wide_b * scale).to(b.dtype).to(tl.float32)
            a = (weight_a.to(tl.float32) * wide_a).to(a.dtype)
            b = (weight_b.to(tl.float32) * wide_b).to(b.dtype)
        if TURN:
            c = tl.load(cos + row * FIRST + low, mask=in_low, other=0.0).to(tl.float32)
            s = tl.load(sin + row * FIRST + low, mask=in_low, other=0.0).to(tl.float32)
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * c - wide_b * s).to(a.dtype)
            b = (wide_b * c + wide_a * s).to(b.dtype)
    if is_query:
        target = queries + (row * NUM_HEADS + head) * DIM
        tl.store(target + low, a, mask=in_low)
        tl.store(target + high, b, mask=in_high)
    elif slot >= 0:
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        offset = kv_head.to(tl.int64) * head_stride + slot * DIM
        if is_value:
            tl.store(values + offset + low, a, mask=in_low)
            tl.store(values + offset + high, b, mask=in_high)
        else:
            tl.store(keys + offset + low, a, mask=in_low)
            tl.store(keys + offset + high, b, mask=in_high)
