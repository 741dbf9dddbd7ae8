"""Attention: the layer (projections, biases, QK-norm, rotary positions) and two ways to attend.

`DenseAttention` sees whole sequences at once (training, and the reference in tests). `PagedAttention` reads keys and
values from the paged cache through block tables. The layer does not know which one it was given. Both are plain
PyTorch; `kernels/ops.py` has the one for GPUs.
"""

from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache.states import StateStore
from model.cache.store import PagedStore
from model.config import ModelConfig
from model.nn.batch import TILE, AttentionGroup, ForwardBatch
from model.nn.norm import RMSNorm
from model.nn.ops import Cell, Heads, Look, Ops, Places, Weight
from model.nn.pieces import Pieces, by_pieces
from model.nn.relative import lookup
from model.nn.streams import advance_all, recall_all, recall_tiles
from model.nn.tiles import Reduction, scale_of


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention of one layer; `qkv` holds the three projections' rows."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, places: Places, ops: Ops) -> Tensor:
        n = x.shape[0]
        angles, relative = (None, places) if isinstance(places, Tensor) else (places, None)
        qkv = ops.linear(x, self.qkv.weight, self.qkv.bias).view(n, -1, self.head_dim)
        heads = Heads(qkv, self.heads, self.kv_heads, self.q_norm, self.k_norm, angles, relative)
        mixed = ops.attend(self.layer, heads)
        return ops.linear(mixed.reshape(n, -1), self.out.weight, self.out.bias)


class DenseAttention(Ops):
    """Causal attention inside `b` whole sequences of `t` tokens, rows ordered by sequence."""

    def __init__(self, config: ModelConfig, b: int, t: int, dropout: float = 0.0) -> None:
        self.config, self.b, self.t, self.dropout = config, b, t, dropout

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = (x.view(self.b, self.t, -1, self.config.head_dim).transpose(1, 2) for x in heads.finish())
        window = self.config.window(layer)
        mask: Tensor | None = None
        if window is not None and window < self.t:
            ages = torch.arange(self.t, device=q.device)[:, None] - torch.arange(self.t, device=q.device)
            mask = (ages >= 0) & (ages < window)
        if heads.relative is not None:
            ages = torch.arange(self.t, device=q.device)[:, None] - torch.arange(self.t, device=q.device)
            mask = lookup(heads.relative, -ages).to(q.dtype).masked_fill(ages < 0, -torch.inf)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, is_causal=mask is None, scale=scale_of(self.config),
            enable_gqa=True,
        )  # fmt: skip
        return mixed.transpose(1, 2).reshape(self.b * self.t, -1, self.config.head_dim)

    def recur(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        return cell.parallel(x.view(self.b, self.t, -1)).reshape(self.b * self.t, -1)

    def recall(self, layer: int, look: Look, queries: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        *all_queries, k, v = (x.view(self.b, self.t, -1, self.config.head_dim) for x in (*queries, k, v))
        return recall_all(look, tuple(all_queries), k, v, self.dropout).flatten(0, 1)


class PagedAttention(Ops):
    """Causal attention over the paged cache. New keys and values are written first, so a row sees itself.

    Each sequence's keys are reduced tile by tile, in order (`tiles.py`). A tile that is masked for a row changes
    nothing, to the bit, so neither the length of batch mates nor the size of a prefill chunk can show in a result.
    Linear layers are computed in `pieces`. `states`: of layers that have some.
    """

    def __init__(
        self,
        config: ModelConfig,
        store: PagedStore,
        batch: ForwardBatch,
        pieces: Pieces = MappingProxyType({}),
        states: StateStore | None = None,
    ) -> None:
        self.config, self.store, self.batch, self.pieces, self.states = config, store, batch, pieces, states

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor) and (counts := self.pieces.get(tuple(weight.shape))):
            return by_pieces(x, counts, partial(F.linear, weight=weight, bias=bias))
        return super().linear(x, weight, bias)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = heads.finish()
        n = self.batch.num_rows
        self.store.write(layer, self.batch.slots, k[:n], v[:n])
        mixed = torch.zeros_like(q)
        for group in self.batch.groups:
            mixed[group.rows] = self._attend(layer, q[group.rows], group, heads.relative)
        return mixed

    def recur(self, layer: int, cell: Cell, x: Tensor) -> Tensor:
        assert self.states is not None, "a runner without states"
        return advance_all(cell, layer, x, self.batch, self.states, self)

    def recall(self, layer: int, look: Look, queries: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        n = self.batch.num_rows
        self.store.write(layer, self.batch.slots, k[:n], v[:n])
        mixed = torch.zeros_like(queries[0])
        for group in self.batch.streams:
            rows, reach = tuple(each[group.rows] for each in queries), group.reaches[self.config.kind(layer)]
            mixed[group.rows] = recall_tiles(look, group, reach, self.store, layer, rows, self.batch.attention_rows)
        return mixed

    def _attend(self, layer: int, q: Tensor, group: AttentionGroup, table: Tensor | None) -> Tensor:
        """Output [b, t, heads, d] of one group's queries q [b, t, heads, d]. With a `table` of relative positions every
        head has keys of its own."""
        (_, t, _, _), window = q.shape, self.config.window(layer)
        q = self.as_rows(q)
        shared, rows = self.config.num_heads // self.config.num_kv_heads, q.shape[2]
        at = self.batch.positions[group.rows].repeat_interleave(shared, dim=1)
        at = F.pad(at, (0, rows - t * shared))[:, :, None]  # [b, rows, 1]
        reduction = Reduction(q)
        for tile, live in enumerate(group.live):
            if window is not None and (tile + 1) * TILE <= group.min_position - window + 1:
                continue  # behind every row's window
            keys, values = self._gather(layer, group, tile, live)
            ages = at[:live] - torch.arange(tile * TILE, (tile + 1) * TILE, device=at.device)
            visible = (ages >= 0) if window is None else (ages >= 0) & (ages < window)
            reduction.add(keys, values, visible, None if table is None else lookup(table, -ages))
        return self.as_heads(reduction.mixed(), t).to(q.dtype)

    def as_rows(self, q: Tensor) -> Tensor:
        """Queries [b, t, heads, d] scaled, as [kv_heads, b, rows, d]: the heads that read one kv head become rows, and
        there is a multiple of `attention_rows` of them."""
        (b, t, _, d), kv_heads = q.shape, self.config.num_kv_heads
        num = t * (self.config.num_heads // kv_heads)
        q = (q * scale_of(self.config)).view(b, t, kv_heads, -1, d).permute(2, 0, 1, 3, 4).reshape(kv_heads, b, num, d)
        return F.pad(q, (0, 0, 0, -num % self.batch.attention_rows))

    def as_heads(self, mixed: Tensor, t: int) -> Tensor:
        """The way back: [kv_heads, b, rows, d] -> [b, t, heads, d]."""
        kv_heads, b, _, d = mixed.shape
        shared = self.config.num_heads // kv_heads
        mixed = mixed[:, :, : t * shared].view(kv_heads, b, t, shared, d)
        return mixed.permute(1, 2, 0, 3, 4).reshape(b, t, -1, d)

    def _gather(self, layer: int, group: AttentionGroup, tile: int, live: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one tile, [kv_heads * live, TILE, d]."""
        per_tile = TILE // self.store.block_size
        keys, values = self.store.gather(
            layer, group.block_tables[:live, tile * per_tile : (tile + 1) * per_tile].reshape(-1)
        )
        return keys.view(-1, TILE, self.config.head_dim), values.view(-1, TILE, self.config.head_dim)
