"""The feed-forward half of a layer: plain (GELU, ReLU) or gated (SwiGLU, arXiv 2002.05202)."""

from torch import Tensor, nn

from model.config import ModelConfig
from model.nn.activations import ACTIVATIONS
from model.nn.ops import Ops


class Mlp(nn.Module):
    """`up` holds the gate's rows before the up-projection's when the MLP is gated: one product instead of two."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated_mlp, config.activation
        width = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        h = ops.linear(x, self.up.weight, self.up.bias)
        h = ops.gate(h, self.activation) if self.gated else ACTIVATIONS[self.activation](h)
        return ops.linear(h, self.down.weight, self.down.bias)
