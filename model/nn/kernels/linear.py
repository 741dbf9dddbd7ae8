"""A matrix product whose rows do not depend on how many there are: one tile shape, one order of additions, always.

Libraries choose another kernel, with another order, for other numbers of rows; this one costs speed for large batches
and makes the same request give the same text alone and in company. The twin is `F.linear`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 64, 32, 64


@triton.jit
def fixed_linear(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    DEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of out [rows, columns] = x [rows, DEEP] by weight [columns, DEEP], plus bias [columns]."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DEEP, DEPTH):
        k = start + tl.arange(0, DEPTH)
        deep = k < DEEP
        a = tl.load(x + row[:, None] * DEEP + k[None, :], mask=in_rows[:, None] & deep[None, :], other=0.0)
        b = tl.load(weight + column[None, :] * DEEP + k[:, None], mask=in_columns[None, :] & deep[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BIASED:
        acc += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * num_columns + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, k] by weight [m, k], plus bias [m] -> [n, m]."""
    x, (n, k), m = x.contiguous(), x.shape, weight.shape[0]
    out = x.new_empty(n, m)
    grid = (triton.cdiv(m, COLUMNS), triton.cdiv(n, ROWS))
    biased = bias is not None
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # the latter is not used by 16-bit types
    fixed_linear[grid](
        x, weight, bias, out, n, m, k, ROWS, COLUMNS, DEPTH, biased, precision, num_warps=4, num_stages=4
    )  # fmt: skip
    return out
