"""The online softmax (arXiv 1805.02867): values mixed key tile by key tile, with a running maximum and sum.

A tile that is masked for a row changes nothing of it, to the bit.
"""

import torch
from torch import Tensor


class RunningMix:
    """For queries [kv_heads, b, rows, d]."""

    def __init__(self, q: Tensor) -> None:
        self._top = q.new_full((*q.shape[:3], 1), -1e30, dtype=torch.float32)
        self._total = torch.zeros_like(self._top)
        self._acc = torch.zeros_like(q, dtype=torch.float32)

    def add(self, scores: Tensor, values: Tensor, live: int) -> None:
        """Scores [kv_heads, live, rows, tile], masked with -inf, and values [kv_heads * live, tile, d] of the first
        `live` of b."""
        kv_heads, _, rows, tile = scores.shape
        top, total, acc = (each[:, :live] for each in (self._top, self._total, self._acc))
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink = torch.exp(top - peak)
        weights = torch.exp(scores - peak)
        part = torch.bmm(weights.view(-1, rows, tile).to(values.dtype), values).view(kv_heads, live, rows, -1)
        self._total[:, :live] = total * shrink + weights.sum(-1, keepdim=True)
        self._acc[:, :live] = acc * shrink + part
        self._top[:, :live] = peak

    def result(self) -> Tensor:
        """[kv_heads, b, rows, d], float32."""
        return self._acc / self._total
