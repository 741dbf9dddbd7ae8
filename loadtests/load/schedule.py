"""When requests are sent: the shape of a run, and arrivals that wait for no answer (an open loop).

In a closed loop a slow server is asked less, so its waits look better than they are (coordinated omission). In an open
loop the times are fixed before anything is sent, and waits count from then. It knows no server and no clock.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from loadtests.load.traces import Arrival

SHAPES = ("flat", "ramp", "soak")
EDGE = 0.1  # of a soak, for coming and for going
T = TypeVar("T")


def share_at(shape: str, progress: float, num_steps: int = 5) -> float:
    """The share of the full load, 0 to 1, at `progress` of the run, 0 to 1. `ramp` climbs `num_steps` equal stairs, so
    that each level can be measured; `soak` rises, stays, and falls again."""
    if shape == "ramp":
        return min(num_steps, math.floor(progress * num_steps) + 1) / num_steps
    if shape == "soak":
        return max(0.02, min(1.0, progress / EDGE, (1 - progress) / EDGE))
    return 1.0


def poisson(rate: float, run_s: float, share: Callable[[float], float], rng: random.Random) -> Iterator[float]:
    """Seconds of arrivals at `rate` a second times the share at that progress: a Poisson process, thinned (Lewis and
    Shedler, 1979)."""
    at_s = rng.expovariate(rate)
    while at_s < run_s:
        if rng.random() < share(at_s / run_s):
            yield at_s
        at_s += rng.expovariate(rate)


def replayed(arrivals: Iterable[Arrival], speed: float, run_s: float | None) -> Iterator[Arrival]:
    """A trace `speed` times as fast, until the run is over."""
    for one in arrivals:
        if run_s is not None and one.at_s / speed >= run_s:
            return
        yield replace(one, at_s=one.at_s / speed)


def dealt(things: Iterable[T], index: int, num: int) -> Iterator[T]:
    """What one of `num` processes sends of all that is sent."""
    return itertools.islice(things, index, None, num)
