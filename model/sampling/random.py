"""Randomness as a pure function of (seed, position). No state, so no batch, restart or worker shows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox-4x32-10: four random 32-bit words for a 128-bit counter and a 64-bit key, low words first.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_NUM_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A multiple of 2**-53 in [0, 1) for output position `position` of a sequence; both count modulo 2**64."""
    counter = (position & _MASK, position >> 32 & _MASK, 0, 0)
    high, low, _, _ = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return ((high << 32 | low) >> 11) * 2.0**-53


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` for many sequences at once, to the bit."""
    mask, shift = np.uint64(_MASK), np.uint64(32)
    seed, position = (np.array([n & (1 << 64) - 1 for n in numbers], dtype=np.uint64) for numbers in (seeds, positions))
    c0, c1, k0, k1 = position & mask, position >> shift, seed & mask, seed >> shift
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(_NUM_ROUNDS):
        a, b = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & mask, (a >> shift) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + np.uint64(_KEY_STEPS[0])) & mask, (k1 + np.uint64(_KEY_STEPS[1])) & mask
    bits: NDArray[np.float64] = ((c0 << shift | c1) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return bits
