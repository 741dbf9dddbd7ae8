"""A long short-term memory in the place of attention (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

It stands in the same residual layer, between the same norm and MLP, so that what is compared is the memory alone. The
gates are in torch's order: input, forget, candidate, output.
"""

import torch
from torch import Tensor, nn

from model.cache.states import State
from model.config import ModelConfig
from model.kinds import Lstm
from model.nn.batch import pad_rows
from model.nn.ops import Ops, Places


class LstmMixer(nn.Module):
    """One layer of kind `Lstm`; a `Cell` itself, whose rows are the layer's inputs."""

    def __init__(self, config: ModelConfig, layer: int, kind: Lstm) -> None:
        super().__init__()
        self.layer, self.width = layer, kind.width
        self.input = nn.Linear(config.hidden_size, 4 * kind.width)
        self.recurrent = nn.Linear(kind.width, 4 * kind.width, bias=False)
        self.out = nn.Linear(kind.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, places: Places, ops: Ops) -> Tensor:
        return ops.linear(ops.recur(self.layer, self, x), self.out.weight)

    def remember(self) -> None:
        """Set the forget gates' biases to one, so that a fresh network forgets little (Jozefowicz et al. 2015)."""
        nn.init.ones_(self.input.bias[self.width : 2 * self.width])

    def parallel(self, x: Tensor) -> Tensor:
        clean = x.new_zeros(1, x.shape[0], self.width)
        weights = [self.input.weight, self.recurrent.weight, self.input.bias, torch.zeros_like(self.input.bias)]
        out: Tensor = torch.lstm(x, (clean, clean), weights, True, 1, 0.0, self.training, False, True)[0]
        return out

    def advance(self, state: State, x: Tensor, starts: tuple[int, ...], ops: Ops, least: int) -> tuple[Tensor, State]:
        b, t, _ = x.shape
        weight, bias = self.input.weight, self.input.bias
        gates = ops.linear(pad_rows(x.flatten(0, 1), least), weight, bias)[: b * t].view(b, t, -1)
        out, cells = state
        outs = []
        for i in range(t):
            turned = ops.linear(pad_rows(out.to(x.dtype), least), self.recurrent.weight)[:b]
            let_in, keep, new, show = (gates[:, i] + turned).float().chunk(4, dim=-1)
            cells = keep.sigmoid() * cells + let_in.sigmoid() * new.tanh()
            out = show.sigmoid() * cells.tanh()
            outs.append(out)
        return torch.stack(outs, dim=1).to(x.dtype), (out, cells)
