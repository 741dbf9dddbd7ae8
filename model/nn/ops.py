"""How one forward pass is computed: the operations that have a plain form and a faster one, and how rows attend.

The network calls these and does not know which it was given. The methods here are the plain PyTorch forms: they are
what training uses, what runs everywhere, and what every kernel is compared with.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache.states import State
from model.nn.activations import ACTIVATIONS
from model.nn.norm import RMSNorm
from model.nn.positions import rotate
from model.nn.quantized import Int8Weight

Angles = tuple[Tensor, Tensor]
Places = Angles | Tensor | None
"""How a layer learns where rows stand: angles to turn by, a table of `relative.py`, or nothing."""
Weight = Tensor | Int8Weight


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's projections `qkv` [n, heads + 2 * kv_heads, d], and what has still to be done to them: a norm of
    queries and keys (None: no), and a turn by `angles` (None: no). `relative` is the table of what is added to the
    scores (None: nothing)."""

    qkv: Tensor
    num_heads: int
    num_kv_heads: int
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    angles: Angles | None
    relative: Tensor | None = None

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, heads, d], keys and values [n, kv_heads, d], normed and turned."""
        q, k, v = torch.split_with_sizes(self.qkv, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.angles is not None:
            q, k = rotate(q, self.angles), rotate(k, self.angles)
        return q, k, v


class Ops(ABC):
    """The operations of one pass. Rows are tokens of any number of sequences; only `attend` mixes them."""

    @abstractmethod
    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Mixed values [n, heads, d]."""

    def cross(self, layer: int, q: Tensor) -> Tensor:
        """Mixed values [n, heads, d] of queries q [n, heads, d] to the sources of their sequences."""
        raise NotImplementedError("nobody gave this pass a source")

    def recur(self, layer: int, cell: "Cell", x: Tensor) -> Tensor:
        """Rows x [n, in] through a layer that carries a state from token to token -> [n, out]."""
        raise NotImplementedError(f"{type(self).__name__} keeps no states")

    def recall(self, layer: int, look: "Look", queries: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        """Values mixed as `look` scores keys: queries [n, heads, d], k, v [n, kv_heads, d] -> [n, heads, d]."""
        raise NotImplementedError(f"{type(self).__name__} has one way to score keys")

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [n, k] by weight [m, k] -> [n, m]."""
        return weight.linear(x, bias) if isinstance(weight, Int8Weight) else F.linear(x, weight, bias)

    def add_norm(self, x: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The residual stream x [n, hidden] with a layer's update added (None: none yet), and its norm."""
        x = x if update is None else x + update
        return x, norm(x)

    def gate(self, h: Tensor, activation: str) -> Tensor:
        """activation(first half) * second half of h [n, 2 * width] -> [n, width]."""
        gate, up = h.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up


class Cell(Protocol):
    """What carries a state. Rows are float32 or the network's dtype, as the layer made them."""

    def parallel(self, x: Tensor) -> Tensor:
        """x [b, t, in] of whole sequences -> [b, t, out]."""

    def advance(self, state: State, x: Tensor, starts: tuple[int, ...], ops: Ops, least: int) -> tuple[Tensor, State]:
        """The next x [b, t, in] of sequences that have computed `starts` tokens, and their states [b, ...], which it
        may overwrite -> [b, t, out] and the states after them. Rows of products are padded to a multiple of `least`:
        what comes out must not depend on how a sequence is cut into calls."""


class Look(Protocol):
    """What scores keys. Queries are [kv_heads, b, rows, d], scaled, where rows that share a kv head follow each other;
    `at` [b, rows] are their positions."""

    num_random: int

    def prepare(self, queries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What of the queries serves all keys."""

    def scores(self, prepared: tuple[Tensor, ...], keys: Tensor, at: Tensor, first: Tensor) -> Tensor:
        """Scores [kv_heads, b, rows, TILE] of keys [kv_heads, b, TILE, d] at positions from `first` [b] on."""

    def visible(self, at: Tensor, key_at: Tensor, kept: Tensor) -> Tensor:
        """Which keys at `key_at` [b, TILE] each row sees, [b, rows, TILE]; `kept` [b, rows, num_random] are its random
        blocks. A negative position is no key."""

    def blocks(self, position: int) -> tuple[int, ...]:
        """The `num_random` random blocks that the row at a position sees, -1 for none."""

    def tiles(self, start: int, stop: int) -> list[int]:
        """All tiles, in order, with keys that rows from `start` to before `stop` see."""
