"""Linear attention by positive random features (FAVOR+ of Performer, arXiv 2009.14794).

exp(q . k) is the mean over random w of f(q) f(k), f(x) = exp(w . x - |x|^2 / 2); so all keys and values before a block
are one sum of f(k) v, of constant size. The features are orthogonal, drawn once from the layer's number by a generator
whose numbers are fixed for all time (numpy's RandomState): they are no part of a checkpoint, and training does not
redraw them. Keys are not scaled by their maximum, as Performer does, since a stream doesn't know it: with unit normal w
of d numbers f(k) stays below exp(|w|^2 / 2), which float32 holds for heads of up to 128 numbers.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache.states import State
from model.config import ModelConfig
from model.kinds import FAVOR_BLOCK, Linear
from model.nn.attention import Attention
from model.nn.ops import Heads, Ops, Places

LEAST = 1e-6  # added to each feature, as in Performer: a sum of them is never zero


class Features(nn.Module):
    """`weight` [num, d], a table and no parameter: rows of random orthogonal matrices as long as normal ones."""

    def __init__(self, num: int, d: int, seed: int) -> None:
        super().__init__()
        random = np.random.RandomState(seed)
        blocks = []
        for _ in range(-(-num // d)):
            turn, upper = np.linalg.qr(random.standard_normal((d, d)))
            blocks.append(turn * np.sign(np.diag(upper)))
        rows = np.concatenate(blocks)[:num] * np.linalg.norm(random.standard_normal((num, d)), axis=1, keepdims=True)
        self.register_buffer("weight", torch.from_numpy(rows.astype(np.float32)), persistent=False)

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        """f of x [n, h, d], [n, h, num], float32. A query's may have any factor, for it cancels."""
        weight = self.get_buffer("weight")
        x = x.float()
        found = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:2], -1) - x.square().sum(-1, True) / 2
        if is_query:
            found = found - found.detach().amax(-1, keepdim=True)
        return (found.exp() + LEAST) / math.sqrt(len(weight))


class LinearAttention(Attention):
    """One layer of kind `Linear`; a `Cell` itself. Parameters as in full attention. The rows given to the cell hold the
    features of queries and keys, and the values."""

    def __init__(self, config: ModelConfig, layer: int, kind: Linear) -> None:
        super().__init__(config, layer)
        self.num = kind.num_features
        self.features = Features(self.num, self.head_dim, layer)

    def forward(self, x: Tensor, places: Places, ops: Ops) -> Tensor:
        n, angles = x.shape[0], places if isinstance(places, tuple) else None
        qkv = ops.linear(x, self.qkv.weight, self.qkv.bias).view(n, -1, self.head_dim)
        q, k, v = Heads(qkv, self.heads, self.kv_heads, self.q_norm, self.k_norm, angles).finish()
        scale = self.head_dim**-0.25
        parts = self.features(q * scale, True), self.features(k * scale, False), v.float()
        mixed = ops.recur(self.layer, self, torch.cat([part.flatten(1) for part in parts], dim=1))
        return ops.linear(mixed.to(x.dtype), self.out.weight, self.out.bias)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows x [b, t, in] as features of queries [b, kv, t * shared, num] and of keys [b, kv, t, num], and values
        with a one at their end [b, kv, t, d + 1]."""
        b, t, _ = x.shape
        widths = [self.heads * self.num, self.kv_heads * self.num, self.kv_heads * self.head_dim]
        q, k, v = x.split_with_sizes(widths, dim=-1)
        q = q.view(b, t, self.kv_heads, -1, self.num).transpose(1, 2).flatten(2, 3)
        k = k.view(b, t, self.kv_heads, self.num).transpose(1, 2)
        v = F.pad(v.view(b, t, self.kv_heads, self.head_dim), (0, 1), value=1.0).transpose(1, 2)
        return q, k, v

    def _finish(self, sums: Tensor, t: int) -> Tensor:
        """Sums [b, kv, t * shared, d + 1] -> mixed values [b, t, heads * d]."""
        mixed = sums[..., :-1] / sums[..., -1:]
        b, kv_heads, rows, d = mixed.shape
        return mixed.view(b, kv_heads, t, rows // t, d).transpose(1, 2).reshape(b, t, -1)

    def parallel(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        num = -(-t // FAVOR_BLOCK)
        q, k, v = self._parts(F.pad(x, (0, 0, 0, -t % FAVOR_BLOCK)))
        q, k, v = (each.view(b, self.kv_heads, num, -1, each.shape[-1]) for each in (q, k, v))
        sums = (k.transpose(-1, -2) @ v).cumsum(2)
        before = F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        shared = q.shape[3] // FAVOR_BLOCK
        place = torch.arange(FAVOR_BLOCK, device=x.device)
        later = place > place.repeat_interleave(shared)[:, None]
        inside = (q @ k.transpose(-1, -2)).masked_fill(later, 0.0)
        mixed = (inside @ v + q @ before).flatten(2, 3)
        return self._finish(mixed, num * FAVOR_BLOCK)[:, :t]

    def advance(self, state: State, x: Tensor, starts: tuple[int, ...], ops: Ops, least: int) -> tuple[Tensor, State]:
        t = x.shape[1]
        if t == 1:
            return self._piece(state, x, starts, least)
        outs: list[Tensor] = []
        for i, start in enumerate(starts):
            one, at = tuple(each[i : i + 1] for each in state), 0
            parts: list[Tensor] = []
            while at < t:
                stop = min(t, at + FAVOR_BLOCK - (start + at) % FAVOR_BLOCK)
                part, one = self._piece(one, x[i : i + 1, at:stop], (start + at,), least)
                parts.append(part)
                at = stop
            outs.append(torch.cat(parts, dim=1))
            for each, new in zip(state, one, strict=True):
                each[i : i + 1] = new
        return torch.cat(outs), state

    def _piece(self, state: State, x: Tensor, starts: tuple[int, ...], least: int) -> tuple[Tensor, State]:
        """Tokens that lie in one block, [b, t, in]. Every product has the same shape but for its rows, which are padded
        to a multiple of `least`: so no row depends on how many came with it."""
        sums, keys, values = state
        (b, t, _), device = x.shape, x.device
        q, k, v = self._parts(x)
        place = (torch.tensor(starts, device=device) % FAVOR_BLOCK)[:, None] + torch.arange(t, device=device)
        who = torch.arange(b, device=device)[:, None]
        keys[who, :, place], values[who, :, place] = k.transpose(1, 2), v.transpose(1, 2)
        rows = q.shape[2]
        q = F.pad(q, (0, 0, 0, -rows % least)).flatten(0, 1)
        own = F.pad(place.repeat_interleave(rows // t, dim=1), (0, -rows % least))
        later = torch.arange(FAVOR_BLOCK, device=device) > own[:, None, :, None]
        inside = torch.bmm(q, keys.flatten(0, 1).transpose(1, 2)).view(b, self.kv_heads, -1, FAVOR_BLOCK)
        inside = inside.masked_fill_(later, 0.0).flatten(0, 1)
        mixed = torch.bmm(inside, values.flatten(0, 1)) + torch.bmm(q, sums.flatten(0, 1))
        full = (place[:, -1] == FAVOR_BLOCK - 1).nonzero().flatten()
        if len(full):
            gained = torch.bmm(keys[full].flatten(0, 1).transpose(1, 2), values[full].flatten(0, 1))
            sums[full] += gained.view(len(full), *sums.shape[1:])
        mixed = mixed.view(b, self.kv_heads, -1, mixed.shape[-1])[:, :, :rows]
        return self._finish(mixed, t), (sums, keys, values)
