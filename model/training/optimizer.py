"""The two optimisers: AdamW for everything, or Muon for the layers' matrices with AdamW for the rest."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Apply = Callable[[Callable[[Tensor], Tensor], list[Tensor]], Iterable[Tensor]]
"""`map`, or a thread pool's."""

Optimizers = tuple[torch.optim.Optimizer, ...]


def make_optimizers(decoder: nn.Module, name: str, weight_decay: float, apply: Apply = map) -> Optimizers:
    """`adamw` or `muon`; embeddings, head, norms and biases are AdamW's in both. Matrices decay, vectors do not."""
    named = list(decoder.named_parameters())
    vectors = [p for _, p in named if p.ndim < 2]
    inner = [p for n, p in named if p.ndim == 2 and _is_inner(n)]
    outer = [p for n, p in named if p.ndim == 2 and not _is_inner(n)]
    decayed = outer if name == "muon" else outer + inner
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    return (adamw, Muon(inner, weight_decay, apply)) if name == "muon" else (adamw,)


def _is_inner(name: str) -> bool:
    return name.startswith(("layers.", "encoder.layers."))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al. 2024), scaled to AdamW's size (arXiv 2502.16982, 2.2).

    torch.optim.Muon computes in bfloat16, which CPUs without bfloat16 units do fifty times slower than float32.
    """

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float, apply: Apply) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})
        self.apply = apply

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; `closure` is part of torch's signature only."""
        for group in self.param_groups:
            ahead = [self._ahead(matrix, group["momentum"]) for matrix in group["params"]]
            for matrix, update in zip(group["params"], self.apply(orthogonal, ahead), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))

    def _ahead(self, matrix: Tensor, momentum: float) -> Tensor:
        """The gradient as Nesterov's momentum looks at it."""
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        assert matrix.grad is not None
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix's U S V^T, by five Newton-Schulz steps (singular values end between 0.7 and 1.2)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x
