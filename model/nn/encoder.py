"""The encoder: layers in which every token sees every other of its own sequence, and the two ways to compute that.

`DenseEncoding` sees sequences padded to one length (training). `TiledEncoding` sees whole sequences one behind another
and gives each row the same numbers, to the bit, whatever else is computed with it (serving). The layers are the
decoder's own, and do not know which one they were given. It knows no embedding: rows come in, rows go out.
"""

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.nn.batch import TILE
from model.nn.layer import make_last_norm, make_layers, run_layers
from model.nn.ops import Heads, Ops, Weight
from model.nn.pieces import Pieces, by_pieces
from model.nn.relative import RelativeBias, lookup
from model.nn.tiles import Reduction, real, scale_of


class Encoder(nn.Module):
    """`encoder_layers` layers over embedded rows."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = make_layers(config, config.encoder_layers, dropout)
        self.norm = make_last_norm(config)
        self.relative: RelativeBias | None = None
        if config.position == "relative":
            self.relative = RelativeBias(config.relative_buckets, config.relative_distance, config.num_heads, True)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """What is made of rows [n, hidden]."""
        places = None if self.relative is None else self.relative.table()
        return run_layers(self.layers, self.norm, x, places, ops)


class DenseEncoding(Ops):
    """Attention among the tokens of each of `b` sequences of `t` tokens, of which the first `lengths` [b] are real;
    rows ordered by sequence."""

    def __init__(self, config: ModelConfig, b: int, t: int, lengths: Tensor, dropout: float = 0.0) -> None:
        self.config, self.b, self.t, self.dropout = config, b, t, dropout
        self.mask = real(lengths, t)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = (x.view(self.b, self.t, -1, self.config.head_dim).transpose(1, 2) for x in heads.finish())
        mask = self.mask
        if heads.relative is not None:
            at = torch.arange(self.t, device=q.device)
            bias = lookup(heads.relative, at - at[:, None]).to(q.dtype)
            mask = bias.masked_fill(~mask, -torch.inf)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, scale=scale_of(self.config), enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(self.b * self.t, -1, self.config.head_dim)


class TiledEncoding(Ops):
    """Attention among the tokens of each of some sequences of `lengths`, one behind another; further rows are padding.
    `rows` is the multiple to which attention pads query rows. Linear layers are computed in `pieces`."""

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], rows: int, pieces: Pieces = MappingProxyType({})
    ) -> None:
        self.config, self.lengths, self.rows, self.pieces = config, lengths, rows, pieces

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor) and (counts := self.pieces.get(tuple(weight.shape))):
            return by_pieces(x, counts, partial(F.linear, weight=weight, bias=bias))
        return super().linear(x, weight, bias)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = heads.finish()
        mixed, first = torch.zeros_like(q), 0
        for length in self.lengths:
            span = slice(first, first + length)
            mixed[span] = self._attend(q[span], k[span], v[span], heads.relative)
            first += length
        return mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        """Output [n, heads, d] of one sequence's queries [n, heads, d], keys and values [n, kv_heads, d]."""
        (n, _, d), kv_heads = q.shape, self.config.num_kv_heads
        shared = self.config.num_heads // kv_heads
        num = n * shared
        q = (q * scale_of(self.config)).view(n, kv_heads, shared, d).transpose(0, 1).reshape(kv_heads, 1, num, d)
        reduction = Reduction(F.pad(q, (0, 0, 0, -num % self.rows)))
        at = F.pad(torch.arange(n, device=q.device).repeat_interleave(shared), (0, -num % self.rows))
        k, v = (F.pad(x.transpose(0, 1), (0, 0, 0, -n % TILE)) for x in (k, v))
        for start in range(0, n, TILE):
            keys = torch.arange(start, start + TILE, device=q.device)
            visible = (keys < n).expand(1, len(at), TILE)
            bias = None if table is None else lookup(table, (keys - at[:, None])[None])
            reduction.add(k[:, start : start + TILE], v[:, start : start + TILE], visible, bias)
        mixed = reduction.mixed()[:, 0, :num].view(kv_heads, n, shared, d)
        return mixed.transpose(0, 1).reshape(n, -1, d).to(q.dtype)
