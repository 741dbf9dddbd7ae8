"""The feed-forward half of a layer: plain (GELU, ReLU) or gated (SwiGLU, arXiv 2002.05202)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """`up` holds the gate's rows before the up-projection's when the MLP is gated: one product instead of two."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]
        width = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.up(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]
        return self.down(self.activation(h))  # type: ignore[no-any-return]
