"""How a layer mixes the tokens of a sequence, and what that costs in memory: one small value for each kind of layer.

Plain numbers: no torch, and nothing of ours. A kind says which tokens' keys and values must stay in cache blocks, and
what a running sequence keeps in its slot beside them; the scheduler and the sizing see these numbers only. Its word,
say `window:256:4:2`, is how it stands in config.json and on the command line.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

RANDOM_BLOCK = 16
"""Tokens of one random block of a window layer."""

FAVOR_BLOCK = 32
"""Tokens of a linear layer whose keys and values wait beside the state until they are all there: then they enter it in
one product. So the sums are grouped the same way whatever the chunks."""

MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class CacheNeeds:
    """Which tokens a sequence must have in blocks: the first `num_first`, the last `num_last` (None: all of them, 0:
    none), the one to be computed included, and of each item (window, num) of `randoms` so many random blocks behind
    such a window. `is_shareable`: what is computed for one sequence serves another with the same beginning."""

    num_first: int = 0
    num_last: int | None = None
    randoms: tuple[tuple[int, int], ...] = ()
    is_shareable: bool = True

    def kept(self, position: int) -> frozenset[int]:
        """Random blocks, of RANDOM_BLOCK tokens each, that the token at `position` sees."""
        return frozenset(b for window, num in self.randoms for b in random_blocks(window, num, position) if b >= 0)


def combine(needs: Iterable[CacheNeeds]) -> CacheNeeds:
    """What a network needs whose layers need these."""
    each = list(needs)
    lasts = [one.num_last for one in each if one.num_last is not None]
    return CacheNeeds(
        max((one.num_first for one in each), default=0),
        max(lasts, default=0) if len(lasts) == len(each) and each else None,
        tuple(sorted({pair for one in each for pair in one.randoms})),
        all(one.is_shareable for one in each),
    )


def random_blocks(window: int, num: int, position: int) -> tuple[int, ...]:
    """The random blocks that a token sees, one for each of `num` draws; -1 as long as none lies behind the window.

    BigBird (arXiv 2007.14062) gives every block of queries some random blocks of keys. A stream that keeps a constant
    number of blocks can't pick any of the past, so each draw is a reservoir of one block: of n blocks behind the window
    it holds each with probability 1/n, and once it has let one go it never wants it back. The gaps between the blocks
    it takes follow from their distribution, P(next > n) = (i + 1) / (n + 1), so that nothing need be remembered: a
    position's blocks are a function of (window, draw, position), the same in training, in every chunk and after a
    take-over.
    """
    num_behind = max(0, (position // RANDOM_BLOCK * RANDOM_BLOCK - window) // RANDOM_BLOCK)
    if not num_behind:
        return (-1,) * num
    held = []
    for draw in range(num):
        block = following = 0
        while following < num_behind:
            block = following
            following = int((block + 1) / _uniform(draw, block))
        held.append(block)
    return tuple(held)


def _uniform(draw: int, block: int) -> float:
    """A number in (0, 1] for each pair: the finaliser of SplitMix64."""
    bits = (draw * 0x9E3779B97F4A7C15 + (block + 1) * 0xD1B54A32D192ED03) & MASK_64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK_64
    return ((bits ^ bits >> 31) + 1) / 2**64


@dataclass(frozen=True, slots=True)
class Kind:
    """What all kinds have. `head_dim` and `num_kv_heads` are the network's, in every layer."""

    name: ClassVar[str]
    is_cached: ClassVar[bool] = True  # its keys and values are in blocks
    is_full: ClassVar[bool] = False  # it looks back to the beginning, and so has a longest sequence
    scores_some: ClassVar[bool] = False  # it looks at some of the cached keys

    @property
    def word(self) -> str:
        """The name and the numbers, as `read_kind` takes them."""
        return ":".join([self.name, *(str(getattr(self, item.name)) for item in fields(self))])

    def needs(self) -> CacheNeeds:
        """Of its layer alone."""
        return CacheNeeds(num_last=0, is_shareable=False)

    def state_shapes(self, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """The float32 tensors that a layer of this kind keeps for each running sequence."""
        return ()


@dataclass(frozen=True, slots=True)
class Full(Kind):
    """Attention to everything before."""

    name: ClassVar[str] = "full"
    is_full: ClassVar[bool] = True

    def needs(self) -> CacheNeeds:
        return CacheNeeds()


@dataclass(frozen=True, slots=True)
class Window(Kind):
    """Attention to the last `size` tokens, the own one included, to the first `num_global` (Longformer, arXiv
    2004.05150), and to `num_random` random blocks behind the window (BigBird, arXiv 2007.14062)."""

    name: ClassVar[str] = "window"
    scores_some: ClassVar[bool] = True
    size: int = 256
    num_global: int = 0
    num_random: int = 0

    def needs(self) -> CacheNeeds:
        # A random block is drawn from what has just left the window, once every RANDOM_BLOCK tokens.
        last = self.size + (RANDOM_BLOCK if self.num_random else 0)
        randoms = ((self.size, self.num_random),) if self.num_random else ()
        return CacheNeeds(self.num_global, last, randoms, is_shareable=False)


@dataclass(frozen=True, slots=True)
class RecurrentMemory(Kind):
    """Segments of `segment` tokens, each of which sees itself and the `memory` tokens before it, by relative positions
    (Transformer-XL, arXiv 1901.02860)."""

    name: ClassVar[str] = "recurrent-memory"
    scores_some: ClassVar[bool] = True
    segment: int = 128
    memory: int = 128

    def needs(self) -> CacheNeeds:
        return CacheNeeds(num_last=self.segment + self.memory, is_shareable=False)


@dataclass(frozen=True, slots=True)
class Linear(Kind):
    """Softmax attention estimated by `num_features` positive random features (FAVOR+ of Performer, arXiv 2009.14794):
    the past is a sum of constant size."""

    name: ClassVar[str] = "linear"
    is_cached: ClassVar[bool] = False
    num_features: int = 128

    def state_shapes(self, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """The sum, and the features and values of the block that is not full yet; values have a one at their end."""
        return (
            (num_kv_heads, self.num_features, head_dim + 1),
            (num_kv_heads, FAVOR_BLOCK, self.num_features),
            (num_kv_heads, FAVOR_BLOCK, head_dim + 1),
        )


@dataclass(frozen=True, slots=True)
class Lstm(Kind):
    """A long short-term memory of `width` cells (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
    2000) in attention's place."""

    name: ClassVar[str] = "lstm"
    is_cached: ClassVar[bool] = False
    width: int = 128

    def state_shapes(self, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """Output and cells."""
        return (self.width,), (self.width,)


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Full, Window, RecurrentMemory, Linear, Lstm)}
LARGEST = 2**16  # of any number in a kind
MAY_BE_ZERO = ("num_global", "num_random", "memory")


def read_kind(word: str) -> Kind:
    """`name` or `name:number:...`, where later numbers may be left out. Raises ValueError, one line."""
    name, *numbers = word.split(":")
    if name not in KINDS:
        raise ValueError(f"{word!r}: expected one of {', '.join(KINDS)}")
    names = [item.name for item in fields(KINDS[name])]
    if len(numbers) > len(names):
        raise ValueError(f"{word!r}: expected at most {':'.join([name, *names])}")
    values = {}
    for key, text in zip(names, numbers, strict=False):
        least = 0 if key in MAY_BE_ZERO else 1
        if not (text.isascii() and text.isdigit() and least <= int(text) <= LARGEST):
            raise ValueError(f"{word!r}: {key} {text!r}, expected a whole number from {least} to {LARGEST}")
        values[key] = int(text)
    return KINDS[name](**values)
