"""The tensors of constant size that running sequences keep: one line of each for every slot.

It knows slots by number only; who has which is the scheduler's business. A slot keeps what its last owner left, so
whoever begins a sequence in it reads a clean state, whatever stands there.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig

State = tuple[Tensor, ...]
ITEM_BYTES = 4  # sums over a whole stream are kept in float32, whatever the network computes in


class StateStore:
    """For each layer whose kind has a state, its tensors [num_slots, ...]."""

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        self._layers: dict[int, State] = {}
        for layer in range(config.num_layers):
            shapes = config.kind(layer).state_shapes(config.num_kv_heads, config.head_dim)
            if shapes:
                self._layers[layer] = tuple(torch.zeros(num_slots, *shape, device=device) for shape in shapes)

    def read(self, layer: int, slots: Tensor, is_new: Tensor) -> State:
        """Copies [b, ...] of the states in `slots` [b]; zeros for those of `is_new` [b], which begin here."""
        return tuple(
            each[slots].masked_fill_(is_new.view(-1, *[1] * (each.dim() - 1)), 0.0) for each in self._layers[layer]
        )

    def write(self, layer: int, slots: Tensor, state: State) -> None:
        """Store states [b, ...]."""
        for each, new in zip(self._layers[layer], state, strict=True):
            each[slots] = new


def bytes_per_slot(config: ModelConfig) -> int:
    """Bytes that one running sequence's states take over all layers."""
    shapes = (config.kind(i).state_shapes(config.num_kv_heads, config.head_dim) for i in range(config.num_layers))
    return ITEM_BYTES * sum(math.prod(shape) for layer in shapes for shape in layer)
