"""Attention over keys that come tile by tile. It knows no cache and no batch; the softmax is `running.py`'s."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.nn.running import RunningMix


class Reduction:
    """What queries [kv_heads, b, rows, d], scaled already, have gathered so far. Sums are in float32."""

    def __init__(self, q: Tensor) -> None:
        self._q, self._mix = q, RunningMix(q)

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
        self._mix.add(scores.masked_fill_(~visible, -torch.inf), values, live)

    def mixed(self) -> Tensor:
        """Mixed values [kv_heads, b, rows, d], float32."""
        return self._mix.result()


def scale_of(config: ModelConfig) -> float:
    """What queries are multiplied by."""
    return config.head_dim**-0.5 if config.scaled_scores else 1.0


def real(lengths: Tensor, t: int) -> Tensor:
    """Which of `t` keys each sequence has, as a mask [b, 1, 1, t]."""
    return (torch.arange(t, device=lengths.device) < lengths[:, None])[:, None, None]
