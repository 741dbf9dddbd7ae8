"""Where each head looks: a pass over one text that keeps every weight it mixes values by.

Dense, without a cache, and only for looking: a text of t tokens leaves layers x heads x t x t numbers. It knows no
request and draws nothing.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.nn.bert import Encoder
from model.nn.decoder import Decoder
from model.nn.ops import Heads, Ops


class WatchedAttention(Ops):
    """Attention inside one text, spelled out; `maps` gets the weights [heads, rows, keys] of each layer in turn."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.maps = config, list[Tensor]()

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = (x.float().transpose(0, 1) for x in heads.finish())
        shared = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(shared, dim=0), v.repeat_interleave(shared, dim=0)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        visible = self._visible(layer, q.shape[1], q.device)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        self.maps.append(weights)
        mixed: Tensor = (weights @ v).transpose(0, 1).to(heads.qkv.dtype)
        return mixed

    def _visible(self, layer: int, t: int, device: torch.device) -> Tensor:
        ages = torch.arange(t, device=device)[:, None] - torch.arange(t, device=device)
        if self.config.role == "encoder":
            return torch.ones_like(ages, dtype=torch.bool)
        window = self.config.window(layer) or t
        visible: Tensor = (ages >= 0) & (ages < window)
        return visible


@torch.inference_mode()
def attention_maps(network: Decoder | Encoder, token_ids: list[int]) -> Tensor:
    """Weights [layers, heads, rows, keys], float32 on the CPU: how much row i of a head takes of key j. Rows add up
    to 1."""
    device = next(network.parameters()).device
    ops = WatchedAttention(network.config)
    network(torch.tensor(token_ids, device=device), torch.arange(len(token_ids), device=device), ops)
    return torch.stack(ops.maps).cpu()
