"""Keys and values of sources, in one slot for each running sequence. Who has which slot is the scheduler's business."""

import torch
from torch import Tensor

from model.config import ModelConfig


class CrossStore:
    """`keys`, `values` [layers, kv_heads, slots, length, head_dim], and how many of a slot's are real, `lengths`.

    What is beyond them is zero: masked keys are multiplied by zero, and 0 * NaN is NaN.
    """

    def __init__(
        self, config: ModelConfig, num_slots: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, config.num_kv_heads, num_slots, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * num_slots

    def open(self, slot: int, length: int) -> None:
        """A slot begins anew, for a source of so many tokens."""
        # Only what the last one wrote: zeroing a whole slot of a long model would cost more than filling a short one.
        self.keys[:, :, slot, : self.lengths[slot]] = 0
        self.values[:, :, slot, : self.lengths[slot]] = 0
        self.lengths[slot] = length

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Keys and values k, v [length, kv_heads, head_dim] of a slot's source."""
        self.keys[layer, :, slot, : len(k)] = k.transpose(0, 1)
        self.values[layer, :, slot, : len(v)] = v.transpose(0, 1)

    def copy(self, source: int, target: int) -> None:
        """Make a slot like another."""
        self.open(target, length := self.lengths[source])
        self.keys[:, :, target, :length] = self.keys[:, :, source, :length]
        self.values[:, :, target, :length] = self.values[:, :, source, :length]

    def gather(self, layer: int, slots: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values `start` .. `stop` - 1 of some slots [m], each [kv_heads * m, stop - start, head_dim]."""
        keys, values = (cache[layer][:, slots, start:stop].flatten(0, 1) for cache in (self.keys, self.values))
        return keys, values


def bytes_per_slot(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes that one slot takes, 0 for networks without sources."""
    numbers = 2 * config.num_layers * config.num_kv_heads * length * config.head_dim
    return numbers * dtype.itemsize if config.encoder_layers else 0
