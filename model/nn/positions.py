"""Where a token stands: rotary, learned and sinusoidal positions, all as tables indexed by position.

Tables rather than formulas in the forward pass: a row read from a table is the same number in every batch.
"""

import math

import torch
from torch import Tensor, nn

from model.config import Rope, RopeScaling


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies [head_dim / 2] in radians per token, float32, after scaling."""
    exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    freqs = 1.0 / rope.theta**exponents
    if rope.scaling is None:
        return freqs
    return freqs / rope.scaling.factor if rope.scaling.kind == "linear" else _llama3(freqs, rope.scaling)


def _llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    # Wavelengths beyond original/low_freq_factor are stretched by `factor`, those below original/high_freq_factor stay,
    # and the band between is blended linearly in original/wavelength.
    wavelengths = 2 * math.pi / freqs
    turns = scaling.original_max_position / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * freqs / scaling.factor + blend * freqs


class Rotary(nn.Module):
    """Turns pairs (i, i + d/2) of each head by position times frequency."""

    def __init__(self, rope: Rope, head_dim: int, max_position: int) -> None:
        super().__init__()
        # Made on the CPU even when the network is built on the meta device: no checkpoint holds these tables.
        freqs = inverse_frequencies(rope, head_dim)
        angles = torch.arange(max_position, device="cpu", dtype=torch.float32)[:, None] * freqs
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, 1, d/2] for positions [n]."""
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        return cos[positions][:, None].to(dtype), sin[positions][:, None].to(dtype)


SHORT = 2048
"""Positions of the finer table of `LongRotary`."""


class LongRotary(nn.Module):
    """As `Rotary`, for positions too many for one table: the turn of position a * SHORT + b is that of a * SHORT and
    then that of b. Two small tables, made in float64, since float32 can't tell large angles apart."""

    def __init__(self, rope: Rope, head_dim: int, max_position: int) -> None:
        super().__init__()
        freqs = inverse_frequencies(rope, head_dim).double()
        for name, num, stride in (("fine", SHORT, 1), ("coarse", -(-max_position // SHORT), SHORT)):
            angles = torch.arange(0, num * stride, stride, device="cpu", dtype=torch.float64)[:, None] * freqs
            table = torch.stack([angles.cos(), angles.sin()]).float()
            self.register_buffer(name, table, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, 1, d/2] for positions [n]."""
        cos_a, sin_a = self.get_buffer("coarse")[:, positions // SHORT]
        cos_b, sin_b = self.get_buffer("fine")[:, positions % SHORT]
        cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Heads x [n, h, d] turned by their rows' angles."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SinusoidalPositions(nn.Module):
    """The fixed table of arXiv 1706.03762, section 3.5: sines on even, cosines on odd dimensions."""

    def __init__(self, max_position: int, size: int) -> None:
        super().__init__()
        half = torch.arange(0, size, 2, device="cpu", dtype=torch.float32)
        angles = torch.arange(max_position, device="cpu", dtype=torch.float32)[:, None] / 10_000 ** (half / size)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.get_buffer("table")[positions]
