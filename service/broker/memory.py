"""The in-process broker: a real one, with everything but durability. Nothing of it survives the process.

Owns the queue, the logs and the timers of one event loop; every call runs on it and changes state without an await in
between, so there is no lock. It knows no engine and no HTTP. Requests and entries are kept as the codec's bytes, so
what comes out has crossed the same boundary as in any other broker.

Ledger. A request is in `_records` from submit until `keep_s` after its end. Waiting, it is also in `_waiting`; running,
it is held by the worker, and in `_doomed` once it was cancelled or its time ran out; ended, in neither. `_doomed` is
emptied by every commit, and whoever got in there first decides the reason. An end that the worker reports in that very
commit comes too late: it is dropped with the ids beside it, for the cancellation was there before.
"""

import asyncio
import itertools
import math
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Protocol

from model.request import Delta, Finish, FinishReason, Request
from service.broker.base import Accepted, Entry, Job, QueueLoad, Verdict
from service.broker.codec import decode_entry, decode_request, encode_entry, encode_request
from service.errors import Overloaded, RequestNotFound, Unavailable

RETRY_AFTER_S = (1, 60)  # the range of what a refused client is told
INTERVAL_WEIGHT = 0.1  # of the latest interval between two ends, in the moving average

FINISHES = {
    Verdict.CANCELLED: Finish(FinishReason.CANCELLED),
    Verdict.EXPIRED: Finish(FinishReason.TIMEOUT),
}


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> object: ...


class CallLater(Protocol):
    """`loop.call_later`, or a test's."""

    def __call__(self, delay_s: float, callback: Callable[[], object], /) -> Timer: ...


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class _Record:
    """One request with its log. `timer` is its deadline until the end, then the expiry of the log."""

    id: str
    tenant: str
    payload: bytes
    num_prompt_tokens: int
    order: tuple[int, int]  # priority, arrival
    submitted_s: float
    state: State = State.WAITING
    queue_s: float | None = None
    num_tokens: int = 0
    log: list[bytes] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # pulsed at every entry
    timer: Timer | None = None


def _order(record: _Record) -> tuple[int, int]:
    return record.order


def _start(raw: bytes) -> int:
    return decode_entry(raw).start


class MemoryBroker:
    """Both sides of the contract in `base.py`. Claims go by priority, then arrival.

    `max_waiting` and `max_waiting_tokens` (of prompts) bound what waits, `keep_s` is how long a log outlives its end.
    """

    def __init__(
        self,
        max_waiting: int,
        max_waiting_tokens: int,
        keep_s: float = 120.0,
        clock: Callable[[], float] = time.time,
        call_later: CallLater | None = None,
    ) -> None:
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._keep_s, self._clock, self._call_later = keep_s, clock, call_later
        self._records: dict[str, _Record] = {}
        self._waiting: list[_Record] = []  # sorted by order
        self._num_waiting_tokens = 0
        self._num_running = 0
        self._doomed: dict[str, Verdict] = {}
        self._arrivals = itertools.count()
        self._arrived = asyncio.Event()
        self._refusal: str | None = None
        self._last_end_s = 0.0  # of a running request, or when work began after a pause
        self._end_interval_s: float | None = None

    # --- the HTTP half -----------------------------------------------------------------------------------------------

    async def submit(self, group: Sequence[Request]) -> Accepted:
        """Queue a group whole; its first id submitted again is found again. Raises `Overloaded`, `Unavailable`."""
        first, now = group[0], self._clock()
        if first.id in self._records:
            return Accepted(first.id, created=False)
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if self._is_full(len(group), sum(len(request.prompt_ids) for request in group)):
            raise Overloaded(self._retry_after_s(), len(self._waiting))
        if not self._waiting and not self._num_running:
            self._last_end_s = now
        records = [self._record(request, now) for request in group]
        position = bisect_left(self._waiting, records[0].order, key=_order)
        for record in records:
            self._records[record.id] = record
            self._enqueue(record)
        return Accepted(first.id, position=position)

    async def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        """Read the log itself: a slow reader costs nothing. Raises `RequestNotFound` where its first entry would be."""
        record = self._records.get(id)
        if record is None or record.tenant != tenant:
            raise RequestNotFound(f"no request {id}")
        index = max(0, bisect_right(record.log, after, key=_start) - 1)
        while True:
            while index < len(record.log):
                entry = decode_entry(record.log[index])
                index += 1
                if entry.start < after:
                    entry = _since(entry, after)
                if entry.token_ids or entry.finish:
                    yield entry
                if entry.finish:
                    return
            await record.changed.wait()

    async def cancel(self, id: str, tenant: str) -> None:
        record = self._records.get(id)
        if record is not None and record.tenant == tenant:
            self._doom(record, Verdict.CANCELLED)

    async def load(self) -> QueueLoad:
        oldest_s = min((record.submitted_s for record in self._waiting), default=math.inf)
        return QueueLoad(
            num_waiting=len(self._waiting),
            num_running=self._num_running,
            oldest_wait_s=max(0.0, self._clock() - oldest_s),
            full=self._is_full(1, 1),
            retry_after_s=self._retry_after_s(),
        )

    # --- the worker --------------------------------------------------------------------------------------------------

    async def claim(self, room: int) -> list[Job]:
        """Nothing is awaited once a request was taken, so a claim that is cancelled has taken none."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        now = self._clock()
        jobs = []
        for record in self._waiting[:room]:
            self._dequeue(record)
            record.state = State.RUNNING
            self._num_running += 1
            if record.queue_s is None:
                record.queue_s = max(0.0, now - record.submitted_s)
            so_far = tuple(id for raw in record.log for id in decode_entry(raw).token_ids)
            jobs.append(Job(decode_request(record.payload), so_far))
        return jobs

    async def commit(self, step: Sequence[Delta]) -> Mapping[str, Verdict]:
        """Ids that do not continue the log fence their worker, and the request waits to be claimed again."""
        verdicts: dict[str, Verdict] = {}
        for delta in step:
            record = self._records.get(delta.id)
            if record is None or record.state is not State.RUNNING:
                verdicts[delta.id] = Verdict.FENCED
            elif delta.id in self._doomed:
                continue
            elif delta.start != record.num_tokens:
                verdicts[delta.id] = Verdict.FENCED
                self._requeue(record)
            elif delta.finish is not None:
                self._end(record, delta)
            elif delta.token_ids:
                self._append(record, delta)
        for id, verdict in self._doomed.items():
            verdicts[id] = verdict
            self._finish(self._records[id], FINISHES[verdict])
        self._doomed.clear()
        return verdicts

    async def release(self, ids: Iterable[str]) -> None:
        for id in ids:
            record = self._records.get(id)
            if record is None or record.state is not State.RUNNING:
                continue
            verdict = self._doomed.pop(id, None)
            if verdict is None:
                self._requeue(record)
            else:
                self._finish(record, FINISHES[verdict])

    # --- the composition root ----------------------------------------------------------------------------------------

    def stop_accepting(self, why: str) -> None:
        """From now on `submit` raises `Unavailable(why)`."""
        self._refusal = why

    async def end_all(self, finish: Finish) -> None:
        """End everything that has not ended, waiting or running: the last act of a process or of its engine."""
        self._doomed.clear()
        for record in list(self._records.values()):
            if record.state is not State.ENDED:
                self._finish(record, finish)

    # --- one request -------------------------------------------------------------------------------------------------

    def _record(self, request: Request, now: float) -> _Record:
        assert request.id not in self._records, "ids are drawn at random: one that is known can't be another's"
        order = (request.priority, next(self._arrivals))
        record = _Record(
            request.id, request.tenant, encode_request(request), len(request.prompt_ids), order, submitted_s=now
        )
        if request.deadline_s is not None:
            delay_s = max(0.0, request.deadline_s - now)
            record.timer = self._later(delay_s, partial(self._doom, record, Verdict.EXPIRED))
        return record

    def _enqueue(self, record: _Record) -> None:
        insort(self._waiting, record, key=_order)
        self._num_waiting_tokens += record.num_prompt_tokens
        self._arrived.set()

    def _dequeue(self, record: _Record) -> None:
        del self._waiting[bisect_left(self._waiting, record.order, key=_order)]
        self._num_waiting_tokens -= record.num_prompt_tokens

    def _requeue(self, record: _Record) -> None:
        """From running back to its old place."""
        record.state = State.WAITING
        self._num_running -= 1
        self._enqueue(record)

    def _doom(self, record: _Record, verdict: Verdict) -> None:
        """End what waits; what runs ends at the next commit, for the first of the reasons."""
        if record.state is State.WAITING:
            self._finish(record, FINISHES[verdict])
        elif record.state is State.RUNNING:
            self._doomed.setdefault(record.id, verdict)

    def _finish(self, record: _Record, finish: Finish) -> None:
        self._end(record, Delta(record.id, record.num_tokens, finish=finish))

    def _end(self, record: _Record, last: Delta) -> None:
        """Write the one terminal entry; from here on only the expiry of the log is left."""
        if record.state is State.WAITING:
            self._dequeue(record)
        else:
            self._num_running -= 1
            self._measure_end()
        record.state = State.ENDED
        self._append(record, last, record.queue_s)
        if record.timer is not None:
            record.timer.cancel()
        record.timer = self._later(self._keep_s, partial(self._records.pop, record.id))

    def _append(self, record: _Record, delta: Delta, queue_s: float | None = None) -> None:
        record.log.append(encode_entry(delta, queue_s))
        record.num_tokens += len(delta.token_ids)
        record.changed.set()
        record.changed.clear()

    def _later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Delays, not instants: a step of the wall clock moves no deadline that is already running."""
        call_later = self._call_later or asyncio.get_running_loop().call_later
        return call_later(delay_s, callback)

    # --- load --------------------------------------------------------------------------------------------------------

    def _is_full(self, num_requests: int, num_tokens: int) -> bool:
        """An empty queue takes any group: one that is larger than the limits would otherwise never be served."""
        return bool(self._waiting) and (
            len(self._waiting) + num_requests > self._max_waiting
            or self._num_waiting_tokens + num_tokens > self._max_waiting_tokens
        )

    def _measure_end(self) -> None:
        """Follow the mean time between two ends while there is work: its inverse is the throughput."""
        now = self._clock()
        interval_s = max(0.0, now - self._last_end_s)
        mean_s = interval_s if self._end_interval_s is None else self._end_interval_s
        self._end_interval_s = mean_s + INTERVAL_WEIGHT * (interval_s - mean_s)
        self._last_end_s = now

    def _retry_after_s(self) -> int:
        """Until what waits now will have been served, at the measured throughput."""
        low, high = RETRY_AFTER_S
        return min(high, max(low, math.ceil(len(self._waiting) * (self._end_interval_s or 0.0))))


def _since(entry: Entry, position: int) -> Entry:
    """The part of an entry from an output position on."""
    skip = min(position - entry.start, len(entry.token_ids))
    return replace(entry, start=entry.start + skip, token_ids=entry.token_ids[skip:], logprobs=entry.logprobs[skip:])
