"""How rows attend that also read a source: `attention.py`'s two ways, each with a way to look at the source.

`DenseReading` has the sources of a whole batch at hand (training). `PagedReading` finds them in slots.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from model.cache.cross import CrossStore
from model.cache.store import PagedStore
from model.config import ModelConfig
from model.nn.attention import DenseAttention, PagedAttention
from model.nn.batch import TILE, AttentionGroup, ForwardBatch
from model.nn.cross import KeysValues
from model.nn.pieces import Pieces
from model.nn.tiles import Reduction, real, scale_of


class DenseReading(DenseAttention):
    """`b` sequences of `t` tokens, each with a source: `memory` has each layer's keys and values, rows ordered by
    sequence, of which the first `lengths` [b] of each are real."""

    def __init__(
        self, config: ModelConfig, b: int, t: int, memory: Sequence[KeysValues], lengths: Tensor, dropout: float = 0.0
    ) -> None:
        super().__init__(config, b, t, dropout)
        self.memory = memory
        self.mask = real(lengths, len(memory[0][0]) // b)

    def cross(self, layer: int, q: Tensor) -> Tensor:
        q, k, v = (x.reshape(self.b, -1, *x.shape[1:]).transpose(1, 2) for x in (q, *self.memory[layer]))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, dropout_p=self.dropout, scale=scale_of(self.config), enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(self.b * self.t, -1, self.config.head_dim)


class PagedReading(PagedAttention):
    """Like `PagedAttention`, and the sources are reduced in the same tiles: how long a batch mate's is can't show."""

    def __init__(
        self,
        config: ModelConfig,
        store: PagedStore,
        sources: CrossStore,
        batch: ForwardBatch,
        pieces: Pieces = MappingProxyType({}),
    ) -> None:
        super().__init__(config, store, batch, pieces)
        self.sources = sources

    def cross(self, layer: int, q: Tensor) -> Tensor:
        mixed = torch.zeros_like(q)
        for group in self.batch.groups:
            mixed[group.rows] = self._cross(layer, q[group.rows], group)
        return mixed

    def _cross(self, layer: int, q: Tensor, group: AttentionGroup) -> Tensor:
        """Output [b, t, heads, d] of one group's queries q [b, t, heads, d]."""
        slots = torch.tensor(group.states, device=q.device)
        lengths = torch.tensor([self.sources.lengths[slot] for slot in group.states], device=q.device)
        rows = self.as_rows(q)
        reduction = Reduction(rows)
        for start in range(0, max(self.sources.lengths[slot] for slot in group.states), TILE):
            keys, values = self.sources.gather(layer, slots, start, start + TILE)
            visible = torch.arange(start, start + TILE, device=q.device) < lengths[:, None, None]
            reduction.add(keys, values, visible.expand(-1, rows.shape[2], -1))
        return self.as_heads(reduction.mixed(), q.shape[1]).to(q.dtype)
