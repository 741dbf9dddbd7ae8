"""How rows are cut into pieces so that a row of a 16-bit product depends on no other row.

In float32 it is enough to pad rows to a multiple (`rows.py`). In bfloat16 libraries choose by the number of rows how
much of a sum is kept in registers before it is rounded, and one multiple does not serve: measured with AMX, up to 32
rows agree with each other, 64 and more agree with each other, and the two do not. So the numbers of rows that agree are
measured when a network is loaded, for the very shapes it will use, and rows are computed in pieces of those only.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.nn.rows import cancelling

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LOADS = (1, 8, 32, 512)  # rows of steps that must be fast: a few streams, and a prompt
CALL = 64
"""What a call costs beside its rows, in rows: roughly where reading the weight takes as long as multiplying by it."""

Pieces = Mapping[tuple[int, ...], tuple[int, ...]]
"""Numbers of rows by the shape of a weight; none: any number."""

logger = logging.getLogger(__name__)


def agreeing_counts(shape: tuple[int, int], dtype: torch.dtype, most: int) -> tuple[int, ...]:
    """Numbers of rows, up to about `most`, that give each row the same result in a product with a weight of this shape
    (out, in) on a CPU: of all such sets the one that serves LOADS best. () where rows depend on their place whatever
    their number."""
    usable = [count for count in COUNTS if count < 2 * most]
    rows, weight = cancelling(usable[-1] * 3 // 2, *shape, dtype)
    sets: list[tuple[list[int], Tensor]] = []
    for count in usable:
        out = _rows_of_pieces(rows, weight, count)
        if out is None:
            continue
        for at, (counts, known) in enumerate(sets):
            if torch.equal(out[: len(known)], known):
                sets[at] = [*counts, count], out
                break
        else:
            sets.append(([count], out))
    if not sets:
        logger.warning("rows of a product with %d x %d weights depend on their place in a batch", *shape)
        return ()
    best = min(sets, key=lambda each: _cost(each[0], most))
    return tuple(best[0])


def _rows_of_pieces(rows: Tensor, weight: Tensor, count: int) -> Tensor | None:
    """The first rows of the product, from two pieces of `count` that overlap by half; None if they differ there."""
    half = count // 2
    first, second = (F.linear(rows[at : at + count].contiguous(), weight) for at in (0, half))
    return torch.cat([first, second[count - half :]]) if torch.equal(first[half:], second[: count - half]) else None


def _cost(counts: Sequence[int], most: int) -> float:
    """How much slower LOADS are in such pieces than in one each."""
    loads = [min(load, most) for load in LOADS]
    return sum(sum(CALL + piece for piece in cut(load, counts)) / (CALL + load) for load in loads)


def cut(num: int, counts: Sequence[int]) -> list[int]:
    """Pieces of `counts` (ascending) that hold `num` rows or a few more: whole ones while many rows are left."""
    pieces: list[int] = []
    while num > 0:
        fitting = [count for count in counts if count <= num]
        whole = fitting and (num > CALL or fitting[-1] == counts[-1])
        pieces.append(fitting[-1] if whole else next(count for count in counts if count >= num))
        num -= pieces[-1]
    return pieces


def by_pieces(x: Tensor, counts: Sequence[int], product: Callable[[Tensor], Tensor]) -> Tensor:
    """product(x) for rows x [n, k], computed in pieces of `counts`."""
    if len(x) in counts:
        return product(x)
    pieces, num = cut(len(x), counts), len(x)
    if sum(pieces) > num:
        x = F.pad(x, (0, 0, 0, sum(pieces) - num))
    if len(pieces) == 1:
        return product(x)[:num]
    return torch.cat([product(part) for part in torch.split_with_sizes(x, pieces)])[:num]
