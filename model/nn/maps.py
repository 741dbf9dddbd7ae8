"""Where each head looks: a pass over one text that keeps every weight it mixes values by.

Dense, without a cache, and only for looking: a text of t tokens leaves layers x heads x t x t numbers. It knows no
request and draws nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.nn.bert import Encoder
from model.nn.cross import KeysValues
from model.nn.decoder import Decoder
from model.nn.encoder import DenseEncoding
from model.nn.ops import Heads, Ops
from model.nn.reading import DenseReading
from model.nn.tiles import scale_of


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


class WatchedReading(DenseReading):
    """One answer that reads its source; `maps` gets the weights [heads, rows, source] of each layer in turn."""

    def __init__(self, config: ModelConfig, t: int, memory: Sequence[KeysValues], lengths: Tensor) -> None:
        super().__init__(config, 1, t, memory, lengths)
        self.maps = list[Tensor]()

    def cross(self, layer: int, q: Tensor) -> Tensor:
        k = self.memory[layer][0].repeat_interleave(q.shape[1] // self.config.num_kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale_of(self.config)
        self.maps.append(scores.softmax(-1))
        return super().cross(layer, q)


@torch.inference_mode()
def attention_maps(network: Decoder | Encoder, token_ids: list[int]) -> Tensor:
    """Weights [layers, heads, rows, keys], float32 on the CPU: how much row i of a head takes of key j. Rows add up
    to 1."""
    device = next(network.parameters()).device
    ops = WatchedAttention(network.config)
    network(torch.tensor(token_ids, device=device), torch.arange(len(token_ids), device=device), ops)
    return torch.stack(ops.maps).cpu()


@torch.inference_mode()
def alignment_maps(network: Decoder, source_ids: list[int], answer_ids: list[int]) -> Tensor:
    """Weights [layers, heads, answer, source] of a network with an encoder, float32 on the CPU: how much it takes of
    each token of the source where it draws each token of the answer."""
    device, start_id = next(network.parameters()).device, network.config.start_id
    assert start_id is not None, "this network has no encoder"
    source = torch.tensor(source_ids, device=device)
    before = torch.tensor([start_id, *answer_ids[:-1]], device=device)
    lengths = torch.tensor([len(source)], device=device)
    encoding = DenseEncoding(network.config, 1, len(source), lengths)
    rows = network.encode(source, torch.arange(len(source), device=device), encoding)
    reading = WatchedReading(network.config, len(before), network.memory(rows, encoding), lengths)
    network(before, torch.arange(len(before), device=device), reading)
    return torch.stack(reading.maps).cpu()
