"""Segments with a recurrent memory and relative positions (Transformer-XL, arXiv 1901.02860).

Its memory is the hidden rows of the tokens before the segment, and all that is done with them is to project them to
keys and values. A key knows no position there, so it is the same number whenever it is computed: the cache's blocks are
the memory, and the hidden rows need not be kept. In training whole sequences of several segments are computed at
once, and gradients flow into the memory inside a sequence; the paper stops them because it has to keep what it goes
through, which is at hand here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.kinds import RecurrentMemory
from model.nn.attention import Attention
from model.nn.batch import TILE
from model.nn.ops import Heads, Ops, Places
from model.nn.positions import SinusoidalPositions
from model.nn.quantized import Int8Weight


class MemoryAttention(Attention):
    """One layer of kind `RecurrentMemory`; a `Look` itself. A row scores a key at distance i as (q + u) . k +
    (q + v) . r_i, where r is `relative` of the sinusoids, and u and v are the rows of `shift`."""

    num_random = 0

    def __init__(self, config: ModelConfig, layer: int, kind: RecurrentMemory) -> None:
        super().__init__(config, layer)
        self.kind, self.num_distances = kind, kind.segment + kind.memory
        self.relative = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.shift = nn.Embedding(2, self.heads * self.head_dim)
        self.sinusoids = SinusoidalPositions(self.num_distances, config.hidden_size)
        self._known: Tensor | None = None

    def forward(self, x: Tensor, places: Places, ops: Ops) -> Tensor:
        n = x.shape[0]
        qkv = ops.linear(x, self.qkv.weight, self.qkv.bias).view(n, -1, self.head_dim)
        q, k, v = Heads(qkv, self.heads, self.kv_heads, self.q_norm, self.k_norm, None).finish()
        queries = tuple(q + each for each in self.shift.weight.view(2, self.heads, self.head_dim))
        return ops.linear(ops.recall(self.layer, self, queries, k, v).reshape(n, -1), self.out.weight, self.out.bias)

    def prepare(self, queries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The content's queries, and the scores of all distances [kv_heads, b, rows, num_distances]."""
        content, place = queries
        kv_heads, b, rows, d = place.shape
        distances = self._distances().view(-1, kv_heads, d).permute(1, 2, 0)
        return content, torch.matmul(place.reshape(kv_heads, b * rows, d), distances).view(kv_heads, b, rows, -1)

    def scores(self, prepared: tuple[Tensor, ...], keys: Tensor, at: Tensor, first: Tensor) -> Tensor:
        content, by_distance = prepared
        kv_heads, b, rows, d = content.shape
        ages = (at - first[:, None])[:, :, None] - torch.arange(TILE, device=at.device)
        ages = ages.clamp(0, self.num_distances - 1).expand(kv_heads, b, -1, -1)
        scores = torch.bmm(content.reshape(-1, rows, d), keys.reshape(kv_heads * b, TILE, d).transpose(1, 2))
        return scores.view(kv_heads, b, rows, TILE) + by_distance.gather(-1, ages)

    def visible(self, at: Tensor, key_at: Tensor, kept: Tensor) -> Tensor:
        keys, rows = key_at[:, None], at[:, :, None]
        lowest = (rows // self.kind.segment * self.kind.segment - self.kind.memory).clamp(min=0)
        return (keys >= lowest) & (keys <= rows)

    def blocks(self, position: int) -> tuple[int, ...]:
        return ()

    def tiles(self, start: int, stop: int) -> list[int]:
        first = max(0, start // self.kind.segment * self.kind.segment - self.kind.memory)
        return list(range(first // TILE, (stop - 1) // TILE + 1))

    def train(self, mode: bool = True) -> "MemoryAttention":
        self._known = None
        super().train(mode)
        return self

    def _distances(self) -> Tensor:
        """r of all distances, [num_distances, kv_heads * d]; computed once where nothing is learnt."""
        if self._known is not None and not torch.is_grad_enabled():
            return self._known
        table, weight = self.sinusoids.get_buffer("table").to(self.shift.weight.dtype), self.relative.weight
        known = weight.linear(table, None) if isinstance(weight, Int8Weight) else F.linear(table, weight)
        self._known = None if torch.is_grad_enabled() or self.training else known
        return known
