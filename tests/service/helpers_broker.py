"""What the broker's and the worker's tests share: a clock that a test moves, requests in one line, logs and readers.

How a log is cut into entries is nobody's business, so logs are compared by what they say when joined.
"""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from model.request import Delta, Finish, FinishReason, Request, SamplingParams, TokenLogprob
from service.broker.base import Entry, RequestSide, Verdict, WorkerSide

STOP = Finish(FinishReason.STOP)
HANG_S = 20.0  # nothing that a test waits for takes so long


class FakeTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """Wall clock and timers in one; time passes only in `advance`, which fires what became due, in order."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._count = itertools.count()

    def __call__(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> FakeTimer:
        timer = FakeTimer(callback)
        heapq.heappush(self._timers, (self.now_s + delay_s, next(self._count), timer))
        return timer

    @property
    def num_timers(self) -> int:
        """Those that could still fire."""
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def advance(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            self.now_s, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now_s = end_s


def ask(id: str, num_prompt: int = 3, max_tokens: int = 4, **fields: Any) -> Request:
    """A request; `fields` are further ones of it."""
    return Request(id, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens), **fields)


def ask_group(id: str, num_choices: int, **fields: Any) -> list[Request]:
    """The sequences of one request with several choices."""
    return [ask(f"{id}.{i}", num_choices=num_choices, **fields) for i in range(num_choices)]


# --- logs ------------------------------------------------------------------------------------------------------------


async def read(requests: RequestSide, id: str, after: int = 0, tenant: str = "default") -> list[Entry]:
    """The whole log of a request, live until its end."""
    async with asyncio.timeout(HANG_S):
        return [entry async for entry in requests.follow(id, tenant, after)]


def token_ids(entries: Sequence[Entry]) -> list[int]:
    """Every id once, in order; fails unless each entry continues the one before."""
    ids: list[int] = []
    for entry in entries:
        assert entry.start == entries[0].start + len(ids)
        ids += entry.token_ids
    return ids


def logprobs(entries: Sequence[Entry]) -> list[TokenLogprob]:
    return [logprob for entry in entries for logprob in entry.logprobs]


def ending(entries: Sequence[Entry]) -> Finish:
    """How it ended; fails unless the last entry is the only terminal one, with its timings."""
    (end,) = [entry for entry in entries if entry.finish is not None]
    assert end is entries[-1]
    assert [entry for entry in entries if entry.timings is not None] == [end]
    assert end.finish is not None
    return end.finish


def reason(entries: Sequence[Entry]) -> FinishReason:
    """Why it ended; fails as `ending` does."""
    return ending(entries).reason


# --- readers and workers ---------------------------------------------------------------------------------------------


class Reader:
    """Somebody who follows a request. `entries` is what came so far."""

    def __init__(self, requests: RequestSide, id: str, after: int, tenant: str) -> None:
        self.entries: list[Entry] = []
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._read(requests.follow(id, tenant, after)))

    async def _read(self, entries: AsyncIterator[Entry]) -> None:
        async for entry in entries:
            self.entries.append(entry)
            self._came.set()

    async def got(self, num_tokens: int) -> list[int]:
        """The ids, as soon as there are so many."""
        async with asyncio.timeout(HANG_S):
            while len(token_ids(self.entries)) < num_tokens:
                self._came.clear()
                await self._came.wait()
        return token_ids(self.entries)

    async def log(self) -> list[Entry]:
        """Everything, once it has ended."""
        async with asyncio.timeout(HANG_S):
            await self._task
        return self.entries

    async def leave(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


@asynccontextmanager
async def reading(requests: RequestSide, id: str, after: int = 0, tenant: str = "default") -> AsyncIterator[Reader]:
    """A reader who leaves at the end of the block at the latest."""
    reader = Reader(requests, id, after, tenant)
    try:
        yield reader
    finally:
        await reader.leave()


async def verdicts(worker: WorkerSide, *ids: str, step: Sequence[Delta] = ()) -> dict[str, Verdict]:
    """Commit a step, and then nothing, until there is a verdict for all of these."""
    found = dict(await worker.commit(step))
    async with asyncio.timeout(HANG_S):
        while not found.keys() >= set(ids):
            await asyncio.sleep(0.001)
            found |= await worker.commit([])
    return found
