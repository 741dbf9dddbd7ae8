"""What the broker's and the worker's tests share: a clock that a test moves, requests in one line, whole logs."""

import heapq
import itertools
from collections.abc import Callable

from model.request import Finish, FinishReason, Request, SamplingParams
from service.broker.base import Entry, RequestSide

STOP = Finish(FinishReason.STOP)


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


def ask(
    id: str,
    num_prompt: int = 3,
    max_tokens: int = 4,
    tenant: str = "default",
    priority: int = 0,
    deadline_s: float | None = None,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    prompt_ids = tuple(range(num_prompt))
    return Request(id, prompt_ids, sampling, tenant=tenant, priority=priority, deadline_s=deadline_s)


async def read(requests: RequestSide, id: str, after: int = 0, tenant: str = "default") -> list[Entry]:
    """The whole log of a request, live until its end."""
    return [entry async for entry in requests.follow(id, tenant, after)]


def token_ids(entries: list[Entry]) -> list[int]:
    return [token_id for entry in entries for token_id in entry.token_ids]


def reason(entries: list[Entry]) -> FinishReason:
    """Why it ended; fails unless the last entry is the only terminal one."""
    (end,) = [entry for entry in entries if entry.finish is not None]
    assert end is entries[-1]
    assert end.finish is not None
    return end.finish.reason
