"""LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), computed in float32 whatever the weights' dtype."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm a config asks for, over `size` numbers."""
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(size, config.norm_eps)
