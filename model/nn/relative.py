"""Relative positions as T5 has them: a learned number for each head and bucket of distances, added to the scores.

Near distances have a bucket each, far ones share them by logarithm (arXiv 1910.10683, 2.1). It knows no rows and no
cache: whoever attends looks distances up in the table.
"""

import math

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """`weight` [buckets, heads]. `both_ways`: half of the buckets are for keys that come after the query; without, such
    keys are never seen."""

    def __init__(self, num_buckets: int, distance: int, num_heads: int, both_ways: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))
        # Made on the CPU even when the network is built on the meta device: no checkpoint holds it.
        with torch.device("cpu"):
            self.register_buffer("buckets", _buckets(num_buckets, distance, both_ways), persistent=False)

    def table(self) -> Tensor:
        """The numbers by distance, [2 * limit + 1, heads]: row `limit + d` is for a key `d` tokens after its query, and
        those further away than `limit` are like those at it."""
        return self.weight[self.get_buffer("buckets")]


def lookup(table: Tensor, distances: Tensor) -> Tensor:
    """What to add to scores of shape [..., q, k] with these distances, key minus query: [heads, ..., q, k]."""
    limit = len(table) // 2
    return table[distances.clamp(-limit, limit) + limit].movedim(-1, 0)


def _buckets(num: int, distance: int, both_ways: bool) -> Tensor:
    """The bucket of each distance from -distance to distance."""
    ahead = torch.arange(-distance, distance + 1)
    first = torch.where(ahead > 0, num // 2, 0) if both_ways else torch.zeros_like(ahead)
    away = ahead.abs() if both_ways else (-ahead).clamp(min=0)
    num = num // 2 if both_ways else num
    near = num // 2
    # In float32 and in this order, like the published tables: at a border, rounding decides.
    share = torch.log(away.clamp(min=1).float() / near) / math.log(distance / near)
    far = (near + (share * (num - near)).long()).clamp(max=num - 1)
    return first + torch.where(away < near, away, far)
