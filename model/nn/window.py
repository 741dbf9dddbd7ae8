"""Attention to a window, to the first tokens and to random blocks behind it.

Positions are rotary inside the window and none outside: a key that is far away is judged by its content alone. So no
distance beyond the window ever comes up, in training or after a million tokens, and keys are cached unturned: each tile
of keys is turned by places counted from its own beginning, which leaves the differences as they are.

Longformer (arXiv 2004.05150) gives global tokens projections of their own and lets them see everything; in a stream
they see what every token sees, their past, and have the projections of all others.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kinds import RANDOM_BLOCK, Window, random_blocks
from model.nn.attention import Attention
from model.nn.batch import TILE
from model.nn.ops import Angles, Heads, Ops, Places
from model.nn.positions import Rotary, rotate


class WindowAttention(Attention):
    """One layer of kind `Window`; a `Look` itself. Parameters as in full attention."""

    def __init__(self, config: ModelConfig, layer: int, kind: Window) -> None:
        super().__init__(config, layer)
        self.kind, self.num_random = kind, kind.num_random
        self.turns = Rotary(config.rope, config.head_dim, kind.size + TILE)

    def forward(self, x: Tensor, places: Places, ops: Ops) -> Tensor:
        n = x.shape[0]
        qkv = ops.linear(x, self.qkv.weight, self.qkv.bias).view(n, -1, self.head_dim)
        q, k, v = Heads(qkv, self.heads, self.kv_heads, self.q_norm, self.k_norm, None).finish()
        return ops.linear(ops.recall(self.layer, self, (q,), k, v).reshape(n, -1), self.out.weight, self.out.bias)

    def prepare(self, queries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return queries

    def scores(self, prepared: tuple[Tensor, ...], keys: Tensor, at: Tensor, first: Tensor) -> Tensor:
        [q] = prepared
        places = at - first[:, None]  # of the rows, counted from the tile's beginning
        near = rotate(q, self._angles(places, q.dtype))
        turned = rotate(keys, self._angles(slice(TILE), keys.dtype))
        scores = _product(near, turned)
        if not (self.kind.num_global or self.num_random):
            return scores
        ages = places[:, :, None] - torch.arange(TILE, device=keys.device)
        return torch.where(ages < self.kind.size, scores, _product(q, keys))

    def visible(self, at: Tensor, key_at: Tensor, kept: Tensor) -> Tensor:
        ages, keys = at[:, :, None] - key_at[:, None], key_at[:, None]
        seen = (ages < self.kind.size) | (keys < self.kind.num_global)
        if self.num_random:
            seen = seen | (keys[..., None] // RANDOM_BLOCK == kept[:, :, None]).any(-1)
        return seen & (ages >= 0) & (keys >= 0)

    def blocks(self, position: int) -> tuple[int, ...]:
        return random_blocks(self.kind.size, self.num_random, position)

    def tiles(self, start: int, stop: int) -> list[int]:
        near = range(max(0, start - self.kind.size + 1) // TILE, (stop - 1) // TILE + 1)
        found = {*near, *range(min(-(-self.kind.num_global // TILE), near[0]))}
        begins = (start, *range((start // RANDOM_BLOCK + 1) * RANDOM_BLOCK, stop, RANDOM_BLOCK))
        found |= {block * RANDOM_BLOCK // TILE for at in begins for block in self.blocks(at) if block >= 0}
        return sorted(found)

    def _angles(self, places: Tensor | slice, dtype: torch.dtype) -> Angles:
        """Cosines and sines [..., d / 2]; places outside of the table are of keys outside of the window."""
        if isinstance(places, Tensor):
            places = places.clamp(0, self.kind.size + TILE - 1)
        return self.turns.get_buffer("cos")[places].to(dtype), self.turns.get_buffer("sin")[places].to(dtype)


def _product(q: Tensor, keys: Tensor) -> Tensor:
    """[kv_heads, b, rows, d] by [kv_heads or 1, b, n, d] -> [kv_heads, b, rows, n]."""
    kv_heads, b, rows, d = q.shape
    return torch.bmm(q.reshape(-1, rows, d), keys.reshape(kv_heads * b, -1, d).transpose(1, 2)).view(
        kv_heads, b, rows, -1
    )
