"""The in-process broker: a real one, with everything but durability. Nothing of it survives the process.

Owns the queue, the logs and the timers of one event loop; every call runs on it and changes state without an await in
between, so there is no lock. It knows no engine and no HTTP. Requests are kept as the codec's bytes, so what comes out
has crossed the same boundary as in any other broker.

Ledger. A group is in `_groups` from submit until `keep_s` after the end of its last request, and for so long its
requests are in `_records` and its idempotency key is in `_keys`. Waiting, a request is also in `_queue`; running, it is
held by the worker, and in `_doomed` once it was cancelled or its time ran out; ended, in neither. `_doomed` is emptied
by every commit, and whoever got in there first decides the reason. An end that the worker reports in that very commit
comes too late: it is dropped with the ids beside it, for the cancellation was there before.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from model.request import Delta, Finish, FinishReason, Request
from service.broker.base import (
    CANCELLED,
    OUT_OF_QUEUE_TIME,
    OUT_OF_TIME,
    Accepted,
    Books,
    Entry,
    Glance,
    IdempotencyKey,
    Job,
    QueueLoad,
    Timings,
    Verdict,
)
from service.broker.codec import decode_request, encode_request
from service.broker.fair import FairQueue, Ticket, cost
from service.broker.log import Log
from service.broker.pace import Pace
from service.broker.timers import CallLater, Timers
from service.errors import IdempotencyConflict, Overloaded, RequestNotFound, Unavailable

FAILURE = "the engine failed while computing this request"

FINISHES = {
    Verdict.CANCELLED: CANCELLED,
    Verdict.EXPIRED: Finish(FinishReason.TIMEOUT, stop_reason=OUT_OF_TIME),
}


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class _Group:
    """What was submitted together. `key` is the tenant and the name of its idempotency key."""

    id: str
    tenant: str
    key: tuple[str, str] | None
    body: str
    records: "list[_Record]" = field(default_factory=list)
    num_open: int = 0


@dataclass(slots=True, eq=False)
class _Record:
    """One request with its log. Its timers run until its end: `deadline`, `queue` until the first claim, `orphan` while
    nobody follows."""

    group: _Group
    id: str
    payload: bytes
    num_prompt_tokens: int
    orphan_s: float | None
    ticket: Ticket
    timers: Timers
    state: State = State.WAITING
    queue_s: float | None = None
    ttft_s: float | None = None
    num_readers: int = 0
    num_computed: int = 0
    log: Log = field(default_factory=Log)


class MemoryBroker:
    """Both sides of the contract in `base.py`.

    `max_waiting` and `max_waiting_tokens` (of prompts) bound what waits, `keep_s` is how long a log outlives its end,
    `weights` are the tenants' in fair queueing, 1 where absent. `clock` is wall-clock seconds, the one of deadlines.
    """

    def __init__(
        self,
        max_waiting: int,
        max_waiting_tokens: int,
        keep_s: float = 120.0,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.time,
        call_later: CallLater | None = None,
    ) -> None:
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._keep_s, self._clock, self._call_later = keep_s, clock, call_later
        self._groups: dict[str, _Group] = {}
        self._records: dict[str, _Record] = {}
        self._keys: dict[tuple[str, str], _Group] = {}
        self._queue = FairQueue(weights)
        self._num_waiting_tokens = 0
        self._num_running = 0
        self._num_accepted, self._num_ended = 0, dict.fromkeys(map(str, FinishReason), 0)
        self._doomed: dict[str, Verdict] = {}
        self._arrived = asyncio.Event()
        self._refusal: str | None = None
        self._pace = Pace()

    # --- the HTTP half -----------------------------------------------------------------------------------------------

    async def submit(self, group: Sequence[Request], key: IdempotencyKey | None = None) -> Accepted:
        """What is known already is found again, even if nothing new would be taken in."""
        first, now = group[0], self._clock()
        named = None if key is None else (first.tenant, key.name)
        known = self._keys.get(named) if named else None
        if known is not None and key is not None and known.body != key.body:
            raise IdempotencyConflict
        known = known or self._groups.get(first.group)
        if known is not None:
            return Accepted(known.id, created=False)
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if self._is_full(len(group), sum(len(request.asked_ids) for request in group)):
            raise Overloaded(self._pace.retry_after_s(len(self._queue)), len(self._queue))
        if not self._queue and not self._num_running:
            self._pace.begin(now)
        payloads = [encode_request(request) for request in group]  # what can't be written changes nothing
        new = _Group(first.group, first.tenant, named, key.body if key else "")
        self._groups[new.id] = new
        if named:
            self._keys[named] = new
        for request, payload in zip(group, payloads, strict=True):
            self._admit(new, request, payload, now)
        return Accepted(new.id, position=self._queue.position(new.records[0].ticket))

    async def lookup(self, id: str, tenant: str) -> tuple[Request, ...]:
        """The stored group. Raises `RequestNotFound`."""
        group = self._groups.get(id)
        if group is None or group.tenant != tenant:
            raise _unknown(id)
        return tuple(decode_request(record.payload) for record in group.records)

    def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        """Read the log itself: a slow reader costs nothing. Raises `RequestNotFound` where its first entry would be."""
        record = self._find(id, tenant)
        return _nothing(id) if record is None else record.log.read(after, self._reading(record))

    @contextmanager
    def _reading(self, record: _Record) -> Iterator[None]:
        record.num_readers += 1
        record.timers.stop("orphan")
        try:
            yield
        finally:
            record.num_readers -= 1
            self._watch_orphan(record)

    async def peek(self, id: str, tenant: str) -> Glance:
        """As it is now."""
        record = self._find(id, tenant)
        if record is None:
            raise _unknown(id)
        position = self._queue.position(record.ticket) if record.state is State.WAITING else None
        return Glance(record.log.since(0), position, record.num_computed)

    async def cancel(self, id: str, tenant: str) -> None:
        """End it, at once or with the next commit."""
        record = self._find(id, tenant)
        if record is not None:
            self._doom(record, Verdict.CANCELLED)

    async def load(self) -> QueueLoad:
        """How much there is to do."""
        return QueueLoad(
            num_waiting=len(self._queue),
            num_running=self._num_running,
            oldest_wait_s=max(0.0, self._clock() - self._queue.oldest_s()),
            full=self._is_full(1, 1),
            retry_after_s=self._pace.retry_after_s(len(self._queue)),
        )

    async def books(self) -> Books:
        """What came in, and what became of it."""
        load = await self.load()
        waiting, running, oldest_s = load.num_waiting, load.num_running, load.oldest_wait_s
        return Books(waiting, running, oldest_s if waiting else 0.0, self._num_accepted, dict(self._num_ended))

    # --- the worker --------------------------------------------------------------------------------------------------

    async def claim(self, room: int) -> list[Job]:
        """Nothing is awaited once a request was taken, so a claim that is cancelled has taken none."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        jobs = []
        for _ in range(min(room, len(self._queue))):
            record = self._records[self._queue.take().id]
            self._num_waiting_tokens -= record.num_prompt_tokens
            self._num_running += 1
            record.state = State.RUNNING
            if record.queue_s is None:
                record.queue_s = self._age_s(record)
                record.timers.stop("queue")
            jobs.append(Job(decode_request(record.payload), record.log.since(0).token_ids))
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
            elif delta.start != record.log.num_tokens:
                verdicts[delta.id] = Verdict.FENCED
                self._requeue(record)
            elif delta.token_ids or delta.finish:
                self._append(record, delta)
            else:
                record.num_computed = delta.num_computed
        for id, verdict in self._doomed.items():
            verdicts[id] = verdict
            self._finish(self._records[id], FINISHES[verdict])
        self._doomed.clear()
        return verdicts

    async def release(self, ids: Iterable[str]) -> None:
        """Back to their old places, but for those that were to end anyway."""
        for record in self._taken_back(ids):
            self._requeue(record)

    async def abandon(self, ids: Iterable[str]) -> None:
        """They end as errors: there is no other engine in this process."""
        for record in self._taken_back(ids):
            self._finish(record, Finish(FinishReason.ERROR, error=FAILURE))

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

    def _find(self, id: str, tenant: str) -> _Record | None:
        record = self._records.get(id)
        return record if record is not None and record.group.tenant == tenant else None

    def _admit(self, group: _Group, request: Request, payload: bytes, now: float) -> None:
        assert request.id not in self._records, "ids are drawn at random: one that is known can't be another's"
        ticket = self._queue.add(request.id, request.tenant, cost(request), now, request.priority)
        timers = Timers(self._call_later)
        record = _Record(group, request.id, payload, len(request.asked_ids), request.orphan_s, ticket, timers)
        self._records[record.id] = record
        self._num_accepted += 1
        group.records.append(record)
        group.num_open += 1
        self._num_waiting_tokens += record.num_prompt_tokens
        if request.queue_deadline_s is not None:
            late = partial(self._finish, record, Finish(FinishReason.TIMEOUT, stop_reason=OUT_OF_QUEUE_TIME))
            timers.start("queue", request.queue_deadline_s - now, late)
        if request.deadline_s is not None:
            timers.start("deadline", request.deadline_s - now, partial(self._doom, record, Verdict.EXPIRED))
        self._watch_orphan(record)
        self._arrived.set()

    def _requeue(self, record: _Record) -> None:
        """From running back to its old place."""
        record.state, record.num_computed = State.WAITING, 0
        self._num_running -= 1
        self._num_waiting_tokens += record.num_prompt_tokens
        self._queue.put_back(record.ticket)
        self._arrived.set()

    def _taken_back(self, ids: Iterable[str]) -> Iterator[_Record]:
        """Those of them that run, less the doomed, which end."""
        for id in ids:
            record = self._records.get(id)
            if record is None or record.state is not State.RUNNING:
                continue
            verdict = self._doomed.pop(id, None)
            if verdict is None:
                yield record
            else:
                self._finish(record, FINISHES[verdict])

    def _doom(self, record: _Record, verdict: Verdict) -> None:
        """End what waits; what runs ends at the next commit, for the first of the reasons."""
        if record.state is State.WAITING:
            self._finish(record, FINISHES[verdict])
        elif record.state is State.RUNNING:
            self._doomed.setdefault(record.id, verdict)

    def _finish(self, record: _Record, finish: Finish) -> None:
        self._append(record, Delta(record.id, record.log.num_tokens, finish=finish))

    def _append(self, record: _Record, delta: Delta) -> None:
        timings = None
        if delta.token_ids and record.ttft_s is None:
            record.ttft_s = self._age_s(record)
        if delta.finish is not None:
            timings = Timings(record.queue_s, record.ttft_s, self._age_s(record))
            self._num_ended[delta.finish.reason] += 1
            self._leave(record)
        told = (delta.start, delta.token_ids, delta.logprobs, delta.finish, timings, delta.num_cached, delta.result)
        record.log.append(Entry(*told))

    def _leave(self, record: _Record) -> None:
        """It ends here. With the last of a group, the time of their logs begins to run."""
        if record.state is State.WAITING:
            self._queue.remove(record.ticket)
            self._num_waiting_tokens -= record.num_prompt_tokens
        else:
            self._num_running -= 1
            self._pace.end(self._clock())
        record.state = State.ENDED
        record.timers.stop_all()
        record.group.num_open -= 1
        if not record.group.num_open:
            Timers(self._call_later).start("keep", self._keep_s, partial(self._forget, record.group))

    def _forget(self, group: _Group) -> None:
        del self._groups[group.id]
        if group.key is not None:
            del self._keys[group.key]
        for record in group.records:
            del self._records[record.id]

    def _age_s(self, record: _Record) -> float:
        return round(max(0.0, self._clock() - record.ticket.submitted_s), 6)

    def _watch_orphan(self, record: _Record) -> None:
        if record.orphan_s is not None and not record.num_readers and record.state is not State.ENDED:
            record.timers.start("orphan", record.orphan_s, partial(self._doom, record, Verdict.CANCELLED))

    # --- load --------------------------------------------------------------------------------------------------------

    def _is_full(self, num_requests: int, num_tokens: int) -> bool:
        """An empty queue takes any group: one that is larger than the limits would otherwise never be served."""
        return bool(self._queue) and (
            len(self._queue) + num_requests > self._max_waiting
            or self._num_waiting_tokens + num_tokens > self._max_waiting_tokens
        )


async def _nothing(id: str) -> AsyncIterator[Entry]:
    raise _unknown(id)
    yield


def _unknown(id: str) -> RequestNotFound:
    return RequestNotFound(f"no request {id}")
