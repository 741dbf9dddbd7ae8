"""A broker to test, of any kind, with what its tests do all the time.

A broker joins the contract suite by adding a maker to `MAKERS` in conftest.py: it gets limits and opens a `Rig`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from model.request import Request
from service.broker.base import Job, RequestSide, WorkerSide
from service.broker.memory import MemoryBroker
from tests.service.helpers_broker import HANG_S, FakeClock


@dataclass
class Rig:
    """A broker with one door and one worker. `pass_time` lets what was begun arrive, lets the time pass, and returns
    when what became due was done. `retries`: what was abandoned goes back to the queue, for other engines may try."""

    requests: RequestSide
    worker: WorkerSide
    now_s: Callable[[], float]
    pass_time: Callable[[float], Awaitable[None]]
    retries: bool


@dataclass(frozen=True)
class Limits:
    """What a maker is to build its broker with."""

    max_waiting: int = 100
    max_waiting_tokens: int = 10_000
    keep_s: float = 60.0
    weights: Mapping[str, float] = field(default_factory=dict)


class MakeBroker(Protocol):
    async def __call__(self, limits: Limits | None = None) -> Rig: ...


@asynccontextmanager
async def memory(limits: Limits) -> AsyncIterator[Rig]:
    clock = FakeClock()
    broker = MemoryBroker(
        limits.max_waiting, limits.max_waiting_tokens, limits.keep_s, limits.weights, clock, clock.call_later
    )

    async def pass_time(seconds: float) -> None:
        await asyncio.sleep(0)
        clock.advance(seconds)

    yield Rig(broker, broker, clock, pass_time, retries=False)


async def submit(rig: Rig, *asked: Request) -> None:
    """One after the other, each by itself."""
    for request in asked:
        await rig.requests.submit([request])


async def claim(rig: Rig, room: int = 99) -> list[Job]:
    """What there is, of which there is something."""
    async with asyncio.timeout(HANG_S):
        return await rig.worker.claim(room)


async def running(rig: Rig, *asked: Request) -> None:
    """Submit and claim."""
    await submit(rig, *asked)
    assert len(await claim(rig, len(asked))) == len(asked)


def ids(jobs: list[Job]) -> list[str]:
    return [job.request.id for job in jobs]
