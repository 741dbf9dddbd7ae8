"""Attention over keys that come tile by tile, with a running maximum and sum (the online softmax of arXiv 1805.02867).

A tile that is masked for a row changes nothing of it, to the bit. It knows no cache and no batch.
"""

import torch
from torch import Tensor

from model.config import ModelConfig


class Reduction:
    """What queries [kv_heads, b, rows, d], scaled already, have gathered so far. Sums are in float32."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        kv_heads, b, rows, _ = q.shape
        self._top = q.new_full((kv_heads, b, rows, 1), -1e30, dtype=torch.float32)
        self._total, self._acc = torch.zeros_like(self._top), torch.zeros_like(q, dtype=torch.float32)

    def add(self, keys: Tensor, values: Tensor, visible: Tensor, bias: Tensor | None = None) -> None:
        """One more tile, for the first sequences: keys, values [kv_heads * live, tile, d]; which of them each row may
        see, `visible` [live, rows, tile]; `bias` [kv_heads, live, rows, tile] is added to the scores. The first tile
        must show every row a key."""
        live, rows, tile = visible.shape
        kv_heads, _, _, d = self._q.shape
        scores = torch.bmm(self._q[:, :live].reshape(-1, rows, d), keys.transpose(1, 2)).float()
        scores = scores.view(kv_heads, live, rows, tile)
        if bias is not None:
            scores += bias
        scores.masked_fill_(~visible, -torch.inf)
        peak = torch.maximum(self._top[:, :live], scores.amax(-1, keepdim=True))
        shrink = torch.exp(self._top[:, :live] - peak)
        weights = torch.exp(scores - peak)
        part = torch.bmm(weights.view(-1, rows, tile).to(values.dtype), values).view(kv_heads, live, rows, d)
        self._total[:, :live] = self._total[:, :live] * shrink + weights.sum(-1, keepdim=True)
        self._acc[:, :live] = self._acc[:, :live] * shrink + part
        self._top[:, :live] = peak

    def mixed(self) -> Tensor:
        """Mixed values [kv_heads, b, rows, d], float32."""
        return self._acc / self._total


def scale_of(config: ModelConfig) -> float:
    """What queries are multiplied by."""
    return config.head_dim**-0.5 if config.scaled_scores else 1.0


def real(lengths: Tensor, t: int) -> Tensor:
    """Which of `t` keys each sequence has, as a mask [b, 1, 1, t]."""
    return (torch.arange(t, device=lengths.device) < lengths[:, None])[:, None, None]
