"""Matrix products by tiles of a shape that the caller chooses, with weights of any type.

With one shape always, a row does not depend on how many there are: libraries choose another kernel, with another order
of additions, for other numbers of rows; this one costs speed for large batches and makes the same request give the same
text alone and in company. The twin is `F.linear`. With int8 weights, which are widened in the tile and scaled after the
sum, half of the bytes are read; the twin is `Int8Weight.linear`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """The shape of one program's part: `rows` by `columns`, summed over `depth` at once."""

    rows: int
    columns: int
    depth: int


FIXED, FEW, MANY = Tile(64, 32, 64), Tile(16, 32, 128), Tile(64, 64, 64)


@triton.jit
def tiled_linear(
    x,
    weight,
    bias,
    scales,
    out,
    num_rows,
    num_columns,
    DEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of out [rows, columns] = x [rows, DEEP] by weight [columns, DEEP], times scales [columns],
    plus bias [columns]."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DEEP, DEPTH):
        k = start + tl.arange(0, DEPTH)
        deep = k < DEEP
        a = tl.load(x + row[:, None] * DEEP + k[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
        b = tl.load(weight + column[None, :] * DEEP + k[:, None], mask=in_columns[None, :] & deep[:, None], other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    if SCALED:
        acc *= tl.load(scales + column, mask=in_columns, other=0.0)[None, :]
    if BIASED:
        acc += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * num_columns + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, tile: Tile | None = FIXED
) -> Tensor:
    """x [n, k] by weight [m, k], times scales [m], plus bias [m] -> [n, m]; without a tile, one that suits n."""
    x, (n, k), m = x.contiguous(), x.shape, weight.shape[0]
    rows, columns, depth = tile or (FEW if n <= FEW.rows else MANY)
    out = x.new_empty(n, m)
    grid = (triton.cdiv(m, columns), triton.cdiv(n, rows))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # the latter is not used by 16-bit types
    tiled_linear[grid](
        x, weight, bias, scales, out, n, m, k, rows, columns, depth, bias is not None, scales is not None, precision,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
