"""Triton kernels for attention over the paged cache: one new row of a sequence, and a chunk of them.

Both reduce a row's keys in the same order, which depends on nothing but the row's position: spans of SPAN keys, from
key 0 on, each in tiles of TILE by the online softmax (arXiv 1805.02867), and the spans' results merged first to last.
A long context is read by many programs at once that way (as in Flash-Decoding), and neither batch mates nor the size
of a chunk show in a result: a tile that is masked for a row changes nothing, to the bit. The twin is
`PagedAttention`. Masked keys and values are never loaded, so what stands in a block beyond a sequence cannot matter.
"""

import triton
import triton.language as tl


@triton.jit
def attend_span(
    q,
    row_positions,
    first,
    last,
    table,
    keys,
    values,
    scale,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows q [m, DIM_PAD] over the keys of one sequence from `first` (a multiple of TILE) to `last`, exclusive ->
    unscaled sums [m, DIM_PAD], peaks [m] (base 2) and totals [m], all float32. `keys`, `values`: one head's."""
    dim = tl.arange(0, DIM_PAD)
    peak = tl.full((q.shape[0],), -1e30, tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    acc = tl.zeros((q.shape[0], DIM_PAD), tl.float32)
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        real = at < last
        block = tl.load(table + at // BLOCK, mask=real, other=0).to(tl.int64)
        offsets = (block * BLOCK + at % BLOCK)[:, None] * DIM + dim[None, :]
        mask = real[:, None] & (dim < DIM)[None, :]
        k = tl.load(keys + offsets, mask=mask, other=0.0)
        v = tl.load(values + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = real[None, :] & (at[None, :] <= row_positions[:, None])
        if WINDOW > 0:
            visible = visible & (at[None, :] > row_positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    return acc, peak, total


@triton.jit
def merge(acc, peak, total, next_acc, next_peak, next_total):
    """Two spans' results made one; a span without visible keys changes nothing, to the bit."""
    higher = tl.maximum(peak, next_peak)
    old, new = tl.exp2(peak - higher), tl.exp2(next_peak - higher)
    return acc * old[:, None] + next_acc * new[:, None], higher, total * old + next_total * new


@triton.jit
def attend_one(
    queries,
    keys,
    values,
    tables,
    seats,
    positions,
    sums,
    peaks,
    totals,
    head_stride,
    table_width,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query heads of one row that share a kv head, over one span of its keys -> sums [n, heads, spans, DIM],
    peaks and totals [n, heads, spans]. Spans that hold no visible key are left as they are."""
    row, kv_head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    first, last = span * SPAN, tl.minimum(position + 1, (span + 1) * SPAN)
    if WINDOW > 0:
        first = tl.maximum(first, (position + 1 - WINDOW) // TILE * TILE)
    if first < last:
        table = tables + tl.load(seats + row).to(tl.int64) * table_width
        head, dim = tl.arange(0, SHARED_PAD), tl.arange(0, DIM_PAD)
        at = (row * NUM_KV_HEADS + kv_head) * SHARED + head
        mask = (head < SHARED)[:, None] & (dim < DIM)[None, :]
        q = tl.load(queries + at[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        offset = kv_head.to(tl.int64) * head_stride
        acc, peak, total = attend_span(
            q, tl.full((SHARED_PAD,), 0, tl.int32) + position, first, last, table, keys + offset, values + offset,
            scale, WINDOW, BLOCK, TILE, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
        at = at * tl.num_programs(2) + span
        tl.store(sums + at[:, None] * DIM + dim[None, :], acc, mask=mask)
        tl.store(peaks + at, peak, mask=head < SHARED)
        tl.store(totals + at, total, mask=head < SHARED)


@triton.jit
def merge_spans(
    sums,
    peaks,
    totals,
    positions,
    mixed,
    num_spans,
    NUM_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """The spans of one row's head, first to last -> mixed [n, heads, DIM]."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    dim = tl.arange(0, DIM_PAD)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, position + 1 - WINDOW) // SPAN
    peak = tl.full((1,), -1e30, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DIM_PAD), tl.float32)
    one = tl.arange(0, 1)
    for span in range(first, tl.cdiv(position + 1, SPAN)):
        at = (row * NUM_HEADS + head) * num_spans + span + one
        part = tl.load(sums + at[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        acc, peak, total = merge(acc, peak, total, part, tl.load(peaks + at), tl.load(totals + at))
    out = (acc / tl.maximum(total, 1e-30)[:, None]).to(mixed.dtype.element_ty)
    at = row * NUM_HEADS + head + one
    tl.store(mixed + at[:, None] * DIM + dim[None, :], out, mask=(dim < DIM)[None, :])


@triton.jit
def attend_chunk(
    queries,
    keys,
    values,
    tables,
    pieces,
    mixed,
    head_stride,
    table_width,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few neighbouring rows of one sequence, for one kv head and all query heads that share it -> mixed.

    `pieces` int32 [m, 4]: seat, first row, number of rows, position of the first row.
    """
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    seat = tl.load(pieces + piece * 4).to(tl.int64)
    first_row, num_rows = tl.load(pieces + piece * 4 + 1), tl.load(pieces + piece * 4 + 2)
    first_position = tl.load(pieces + piece * 4 + 3)
    at, dim = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD)
    row, real = at // SHARED, at // SHARED < num_rows
    source = ((first_row + row).to(tl.int64) * NUM_KV_HEADS + kv_head) * SHARED + at % SHARED
    mask = real[:, None] & (dim < DIM)[None, :]
    q = tl.load(queries + source[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    row_positions = first_position + row
    end = first_position + num_rows  # keys that the last row sees
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, first_position + 1 - WINDOW) // TILE * TILE
    table = tables + seat * table_width
    offset = kv_head.to(tl.int64) * head_stride
    # A real row's total is at least 1, the weight of its peak; rows of padding see nothing and must not divide by 0.
    peak = tl.full((ROWS_PAD,), -1e30, tl.float32)
    total = tl.zeros((ROWS_PAD,), tl.float32)
    acc = tl.zeros((ROWS_PAD, DIM_PAD), tl.float32)
    for span in range(begin // SPAN, tl.cdiv(end, SPAN)):
        part, part_peak, part_total = attend_span(
            q, row_positions, tl.maximum(begin, span * SPAN), tl.minimum(end, (span + 1) * SPAN), table,
            keys + offset, values + offset, scale, WINDOW, BLOCK, TILE, DIM, DIM_PAD, PRECISION,
        )  # fmt: skip
        acc, peak, total = merge(acc, peak, total, part, part_peak, part_total)
    out = (acc / tl.maximum(total, 1e-30)[:, None]).to(mixed.dtype.element_ty)
    tl.store(mixed + source[:, None] * DIM + dim[None, :], out, mask=mask)
