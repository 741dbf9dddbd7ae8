"""The tensors of the paged cache. It knows blocks by number only; who owns which is `blocks.py`'s business."""

import torch
from torch import Tensor

from model.config import ModelConfig


class PagedStore:
    """`keys`, `values` [layers, kv_heads, num_blocks, block_size, head_dim] of all layers that have some.

    Heads come before blocks so that gathering a sequence's blocks gives contiguous [kv_heads, tokens, head_dim].
    It starts as zeros and must never keep a NaN: masked keys are multiplied by zero, and 0 * NaN is NaN.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._line = {layer: i for i, layer in enumerate(config.cached_layers)}
        shape = (len(self._line), config.num_kv_heads, num_blocks, block_size, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [n, kv_heads, head_dim] at flat positions `slots` [n]."""
        at = self._line[layer]
        self.keys[at].flatten(1, 2).index_copy_(1, slots, k.transpose(0, 1))
        self.values[at].flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks [m], each [kv_heads, m * block_size, head_dim].

        Heads and blocks are one dimension of whole rows here: selecting rows copies each in one piece, four times as
        fast as selecting along the second dimension.
        """
        at, (_, heads, _, _, head_dim) = self._line[layer], self.keys.shape
        rows = (torch.arange(heads, device=blocks.device)[:, None] * self.num_blocks + blocks).flatten()
        shape = (heads, blocks.numel() * self.block_size, head_dim)
        keys, values = (
            cache[at].view(heads * self.num_blocks, -1).index_select(0, rows).view(shape)
            for cache in (self.keys, self.values)
        )
        return keys, values

    def copy(self, source: int, target: int) -> None:
        """Make a block like another."""
        self.keys[:, :, target] = self.keys[:, :, source]
        self.values[:, :, target] = self.values[:, :, source]

    def clear(self, blocks: list[int]) -> None:
        """Zero some blocks, after a sequence that produced non-finite numbers."""
        self.keys[:, :, blocks] = 0
        self.values[:, :, blocks] = 0


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * len(config.cached_layers) * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize
