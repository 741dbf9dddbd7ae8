"""How many rows a matrix product needs so that a row's result depends on no other row.

Libraries choose another kernel, with another order of additions, for small numbers of rows, and where the border lies
differs by processor and number of threads. (Measured with MKL: on AVX2 with two threads 1-3, 5-7 and 9-11 rows differ
in the last bit from larger numbers; other machines differ up to 9.) So the border is measured when a network is loaded,
for the very shapes it will use, and rows are padded to a multiple beyond it. In 16 bits that is not enough for linear
layers: see `pieces.py`.
"""

import logging
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLES = (4, 8, 16, 32, 64)
NUM_REFERENCE_ROWS = 256

logger = logging.getLogger(__name__)


def linear_rows(shapes: Collection[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> int:
    """The multiple for linear layers of these weight shapes (out, in). GPUs and other dtypes than float32 promise
    nothing at any number of rows, and get none."""
    if device.type == "cuda" or dtype != torch.float32:
        return 1
    random = torch.Generator().manual_seed(0)
    found = MULTIPLES[0] if shapes else 1
    for shape in sorted(set(shapes)):
        weight = torch.randn(shape, generator=random)
        rows = torch.randn(NUM_REFERENCE_ROWS, shape[1], generator=random)
        found = max(found, _smallest(rows, partial(F.linear, weight=weight)))
    return found


def attention_rows(head_dim: int, tile: int, num_heads: int, dtype: torch.dtype) -> int:
    """The multiple for the two products of attention over one tile on a CPU, in a batch of one piece and of several."""
    # Seen in float32, these products depend on their number of rows in ways that a few numbers need not show.
    multiples = MULTIPLES if dtype == torch.float32 else (1, *MULTIPLES)
    found = multiples[0]
    queries, keys = cancelling(NUM_REFERENCE_ROWS, tile, head_dim, dtype)
    weights, values = cancelling(NUM_REFERENCE_ROWS, head_dim, tile, dtype)
    for pieces in {1, 2, 3, num_heads, 8 * num_heads}:
        scores = partial(torch.bmm, mat2=_copies(keys, pieces).transpose(1, 2))
        mixed = partial(torch.bmm, mat2=_copies(values.t(), pieces))
        for rows, product in ((queries, scores), (weights, mixed)):
            found = max(found, _smallest(_copies(rows, pieces), product, multiples))
    return found


def _copies(matrix: Tensor, num: int) -> Tensor:
    return matrix.expand(num, -1, -1).contiguous()


def _smallest(rows: Tensor, product: Callable[[Tensor], Tensor], multiples: tuple[int, ...] = MULTIPLES) -> int:
    """The first multiple at which products over fewer rows give, to the bit, what the product over all of them gives;
    `rows` [..., rows, k]."""
    whole = product(rows)
    for multiple in multiples:
        factors = (1, 2, 3, 5, 9) if multiple > 1 else (*range(1, 33), 48, 64, 128)
        sizes = [multiple * factor for factor in factors if multiple * factor < NUM_REFERENCE_ROWS]
        if all(torch.equal(product(rows[..., :size, :].contiguous()), whole[..., :size, :]) for size in sizes):
            return multiple
    logger.warning("this processor's matrix products depend on their number of rows; results may depend on the batch")
    return multiples[-1]


def cancelling(num: int, m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [num, k] and a weight [m, k] whose product is zero but for rounding: every product of two numbers is there
    with either sign. What is left shows the order of additions, which a rounded sum mostly hides."""
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(k, generator=random)
    rows, weight = (torch.randn(n, -(-k // 2), generator=random) for n in (num, m))
    rows, weight = torch.cat([rows, -rows], dim=1)[:, :k], torch.cat([weight, weight], dim=1)[:, :k]
    return rows[:, order].to(dtype), weight[:, order].to(dtype)
