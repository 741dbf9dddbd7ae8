"""The HTTP half's side of the queue in Redis: submitting, reading along, and keeping a second copy of what was read.

Owns a mirror of every log that somebody reads in this process. Entries come by mail; what the mail loses is read from
the log again. The mirror is also what makes Redis's own losses harmless: a log that has fallen behind it is healed from
it, and a request that is gone is restored, with its ids. It knows no HTTP and no engine.

Ledger. A mirror lives from the first reader of a sequence to the last. Its log only grows, and what is in it may have
been sent to a client: it is never taken back.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgpack

from model.request import Delta, Finish, FinishReason, Request
from service.broker.base import Accepted, Books, Entry, Glance, IdempotencyKey, QueueLoad, Timings
from service.broker.codec import decode_entry, decode_request, encode_entry, encode_request
from service.broker.log import Log, since
from service.broker.redis import AGAIN_S, Link, WorkerInfo
from service.errors import Handover, IdempotencyConflict, Overloaded, RequestNotFound, Unavailable

DIVERGED = Finish(FinishReason.ERROR, error="the queue lost a part of this answer, and ended it with another one")
ASK_S = 0.8  # a client is answered within a second, whatever Redis does
ATTEND_S, REAP_S = 1.0, 0.5
KNOWN = [field.name for field in fields(WorkerInfo)]
ATTENDED = 256  # sequences in one call

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Mirror:
    """One sequence as this process knows it. `early` gathers mail until the log has been read, None after that."""

    id: str
    tenant: str
    log: Log = field(default_factory=Log)
    num_readers: int = 0
    request: bytes = b""
    queue: str = ""
    early: list[Entry] | None = field(default_factory=list)
    opened: "asyncio.Future[None] | None" = None
    num_told: int = -1  # length of the log when it was last compared with Redis's
    mending: bool = False


class RedisRequests:
    """`RequestSide` over Redis. `queue` tells the queue of new requests; it raises `Unavailable` where there is none.

    `weights` of tenants in fair queueing are 1 where absent. `clock` is wall-clock seconds, the one of deadlines.
    """

    def __init__(
        self,
        link: Link,
        queue: Callable[[], str],
        max_waiting: int,
        max_waiting_tokens: int,
        keep_s: float = 120.0,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link, self._queue, self._clock = link, queue, clock
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._keep_ms, self._weights = int(keep_s * 1000), {} if weights is None else weights
        self._name = secrets.token_hex(8)
        self._mirrors: dict[str, dict[str, _Mirror]] = {}  # by id and tenant: a stranger who asks for an id is apart
        self._tasks: set[asyncio.Task[Any]] = set()
        self._look = asyncio.Event()  # compare the mirrors with Redis now
        self._closed = False

    async def open(self) -> None:
        """Begin to hear and to attend. The link is open."""
        self._link.listen({f"mail:{self._name}": self._on_mail}, self._look.set)
        self._spawn(self._attend_for_ever())
        self._spawn(reap_for_ever(self._link))

    async def close(self) -> None:
        """Every follower gets `Handover`; nothing is cancelled."""
        self._closed = True
        for mirror in self._all():
            mirror.log.fail(Handover())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def workers(self) -> list[WorkerInfo]:
        """Those that live. Raises `Unavailable`."""
        told = await self._link.call("workers", within_s=ASK_S)
        return [WorkerInfo(*map(msgpack.unpackb(info).get, KNOWN)) for info in told]  # a newer one may tell more

    # --- the contract ------------------------------------------------------------------------------------------------

    async def submit(self, group: Sequence[Request], key: IdempotencyKey | None = None) -> Accepted:
        """Where Redis does not answer in time it is taken back, should it have arrived all the same; not so one with a
        key, by which its owner will come again and find it."""
        first = group[0]
        if self._closed:
            raise Unavailable("the server is shutting down")
        limits = (self._queue(), self._max_waiting, self._max_waiting_tokens)
        named = (key.name, key.body) if key else ("", "")
        args: list[Any] = [*limits, *self._flow(first), self._keep_ms, *named, first.group]
        for request in group:
            args += self._asked(request, encode_request(request))
        try:
            reply = await self._link.call("submit", *args, within_s=ASK_S)
        except (Unavailable, asyncio.CancelledError):
            for request in group if key is None else ():
                self._spawn(self._cancel(request.id, request.tenant, within_s=60))
            raise
        match reply:
            case [b"full", num_waiting, retry_after_s]:
                raise Overloaded(retry_after_s, num_waiting)
            case [b"conflict"]:
                raise IdempotencyConflict
            case [b"found", id]:  # also our own, where the first reply was lost
                return Accepted(id.decode(), created=False)
        return Accepted(reply[1].decode(), position=reply[2])

    async def lookup(self, id: str, tenant: str) -> tuple[Request, ...]:
        """The stored group of a client's id."""
        stored = await self._link.call("lookup", id, tenant, within_s=ASK_S)
        if not stored:
            raise RequestNotFound(f"no request {id}")
        return tuple(map(decode_request, stored))

    async def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        """From the mirror, which the first reader opens."""
        mirror = self._mirrors.get(id, {}).get(tenant)
        if mirror is None:
            mirror = self._mirrors.setdefault(id, {})[tenant] = _Mirror(id, tenant)
            mirror.opened = self._spawn(self._open(mirror))
        mirror.num_readers += 1
        try:
            assert mirror.opened is not None
            await asyncio.wait({mirror.opened})
            if mirror.opened.cancelled():
                raise Handover
            mirror.opened.result()
            async for entry in mirror.log.read(after):
                yield entry
        finally:
            mirror.num_readers -= 1
            if not mirror.num_readers:
                self._drop(mirror)

    async def peek(self, id: str, tenant: str) -> Glance:
        """As Redis has it now."""
        reply = await self._link.call("peek", id, tenant, within_s=ASK_S)
        if not reply:
            raise RequestNotFound(f"no request {id}")
        position, num_computed, *told = reply
        log = Log()
        for raw, timings in zip(told[::2], told[1::2], strict=True):
            log.append(_entry(raw, timings))
        return Glance(log.since(0), position if position >= 0 else None, num_computed)

    async def cancel(self, id: str, tenant: str) -> None:
        """Also where Redis is away for a while: then it happens when it is back."""
        try:
            await self._cancel(id, tenant, ASK_S)
        except Unavailable:
            self._spawn(self._cancel(id, tenant, within_s=60))

    async def load(self) -> QueueLoad:
        """Raises `Unavailable`."""
        reply = await self._link.call("load", self._queue(), within_s=ASK_S)
        num_waiting, num_tokens, num_running, retry_after_s, oldest_ms = map(int, reply)
        full = num_waiting > 0 and (num_waiting >= self._max_waiting or num_tokens >= self._max_waiting_tokens)
        return QueueLoad(num_waiting, num_running, oldest_ms / 1000, full, retry_after_s)

    async def books(self) -> Books:
        """Raises `Unavailable`. Redis counts, in the same moves that take in and end."""
        reply = await self._link.call("load", self._queue(), "books", within_s=ASK_S)
        waiting, _, running, _, oldest_ms, *books = map(int, reply)
        if not books:
            raise Unavailable("the queue's functions are older than its books")
        accepted, *ended = books
        return Books(waiting, running, oldest_ms / 1000, accepted, dict(zip(FinishReason, ended, strict=True)))

    # --- calls -------------------------------------------------------------------------------------------------------

    def _flow(self, request: Request) -> tuple[str, str, float]:
        """Tenant, class and weight."""
        return request.tenant, "a" if request.priority < 0 else "b", self._weights.get(request.tenant, 1.0)

    def _asked(self, request: Request, raw: bytes) -> list[Any]:
        """One request as `submit` and `restore` take it."""
        now_s, size = self._clock(), len(request.asked_ids)
        left = [
            "" if at_s is None else max(0, int((at_s - now_s) * 1000))
            for at_s in (request.deadline_s, request.queue_deadline_s)
        ]
        orphan = "" if request.orphan_s is None else int(request.orphan_s * 1000)
        return [request.id, raw, size, size + request.sampling.max_tokens, *left, orphan, request.num_choices]

    async def _cancel(self, id: str, tenant: str, within_s: float) -> None:
        await self._link.call("cancel", id, tenant, within_s=within_s)

    async def _read(self, mirror: _Mirror) -> bool:
        """Take in what is new in the log. False if Redis does not know the request."""
        known = mirror.log.num_tokens
        reply = await self._link.call("attach", mirror.id, mirror.tenant, self._name, known, within_s=ASK_S)
        if not reply:
            return False
        mirror.request, mirror.queue, *log = reply
        entries = [_entry(raw, timings) for raw, timings in zip(log[::2], log[1::2], strict=True)]
        for entry in entries:
            self._take(mirror, entry)
        if entries and entries[-1].finish and mirror.log.finish is None:  # as other ids, after a loss here unseen
            mirror.log.append(Entry(mirror.log.num_tokens, finish=DIVERGED, timings=entries[-1].timings))
        return True

    async def _open(self, mirror: _Mirror) -> None:
        """Read the log for the first time: its reader waits until Redis is there."""
        while True:
            try:
                if await self._read(mirror):
                    break
                self._drop(mirror)
                raise RequestNotFound(f"no request {mirror.id}")
            except Unavailable:
                if not mirror.num_readers:
                    self._drop(mirror)
                    raise
                await asyncio.sleep(AGAIN_S)
        early, mirror.early = mirror.early or [], None
        for entry in early:
            self._take(mirror, entry)

    # --- mirrors -----------------------------------------------------------------------------------------------------

    def _on_mail(self, data: bytes) -> None:
        for id, raw, timings in msgpack.unpackb(data, raw=True):
            mirrors = self._mirrors.get(id.decode())
            if mirrors is None:
                continue
            entry = _entry(raw, timings)
            for mirror in mirrors.values():
                if mirror.early is not None:
                    mirror.early.append(entry)
                else:
                    self._take(mirror, entry)

    def _all(self) -> list[_Mirror]:
        return [mirror for same_id in self._mirrors.values() for mirror in same_id.values()]

    def _drop(self, mirror: _Mirror) -> None:
        same_id = self._mirrors.get(mirror.id, {})
        if same_id.get(mirror.tenant) is mirror:
            del same_id[mirror.tenant]
            if not same_id:
                del self._mirrors[mirror.id]

    def _take(self, mirror: _Mirror, entry: Entry) -> None:
        """Append what is new of an entry. What is known must be the same, else Redis's log is the wrong one."""
        log, num = mirror.log, mirror.log.num_tokens
        if log.finish is not None:
            return
        if entry.start == num:
            log.append(entry)
            return
        if entry.start > num:
            self._mend(mirror, self._refill(mirror))
            return
        known = log.since(entry.start).token_ids[: len(entry.token_ids)]
        if known != entry.token_ids[: len(known)]:
            self._mend(mirror, self._heal(mirror, differs=True))
            return
        end = entry.start + len(entry.token_ids)
        rest = since(entry, num) if end >= num else replace(entry, start=num, token_ids=(), logprobs=())
        if rest.token_ids or rest.finish:
            log.append(rest)

    def _mend(self, mirror: _Mirror, how: Coroutine[Any, Any, None]) -> None:
        """One repair of a mirror at a time; what it leaves is found at the next look."""
        if mirror.mending or mirror.early is not None:
            how.close()
            return

        async def mend() -> None:
            try:
                await how
            except Unavailable as error:
                logger.warning("request %s could not be mended yet: %s", mirror.id, error)
            finally:
                mirror.mending = False

        mirror.mending = True
        self._spawn(mend())

    async def _refill(self, mirror: _Mirror) -> None:
        if not await self._read(mirror):
            await self._restore(mirror)

    async def _heal(self, mirror: _Mirror, differs: bool = False) -> None:
        """Give back to Redis's log what it has lost."""
        num, raw = self._copy(mirror)
        done = await self._link.call("heal", mirror.id, num, raw, "1" if differs else "0", within_s=ASK_S)
        if done == -1:
            await self._restore(mirror)
        elif done:
            logger.warning("request %s: the log had lost ids; healed to %d", mirror.id, num)

    async def _restore(self, mirror: _Mirror) -> None:
        """Submit it again, with its ids."""
        request, (num, raw) = decode_request(mirror.request), self._copy(mirror)
        flow = (mirror.queue, *self._flow(request), self._keep_ms, self._name)
        asked = self._asked(request, mirror.request)
        if await self._link.call("restore", *flow, *asked, num, raw, within_s=ASK_S):
            logger.warning("request %s was lost; restored with %d ids", mirror.id, num)

    def _copy(self, mirror: _Mirror) -> tuple[int, bytes]:
        whole = mirror.log.since(0)
        return len(whole.token_ids), encode_entry(Delta(mirror.id, 0, whole.token_ids, whole.logprobs))

    async def _attend_for_ever(self) -> None:
        """Tell Redis what is being read here, and compare: every second, and at once when mail may have been lost."""
        while True:
            at_once = self._look.is_set()
            self._look.clear()
            open_mirrors = [m for m in self._all() if m.early is None and m.log.finish is None]
            try:
                for i in range(0, len(open_mirrors), ATTENDED):
                    await self._attend(open_mirrors[i : i + ATTENDED], at_once)
            except Unavailable:
                self._look.set()  # when it answers again, everything may be different
                await asyncio.sleep(0.1)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(ATTEND_S * random.uniform(0.9, 1.1)):
                    await self._look.wait()

    async def _attend(self, mirrors: list[_Mirror], at_once: bool) -> None:
        reply = await self._link.call("attend", self._name, *(m.id for m in mirrors), within_s=ASK_S)
        for mirror, num, ended in zip(mirrors, reply[::2], reply[1::2], strict=True):
            known = mirror.log.num_tokens
            if num == -1:
                self._mend(mirror, self._restore(mirror))
            elif num < known and not ended:
                self._mend(mirror, self._heal(mirror))
            elif (num > known or ended) and (at_once or mirror.num_told == known):
                self._mend(mirror, self._refill(mirror))  # the mail is late by a second, or is lost
            mirror.num_told = known

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run something that no client's leaving shall break off."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Unavailable | RequestNotFound):
            logger.error("the queue's reader broke", exc_info=error)


async def reap_for_ever(link: Link) -> None:
    """What has to happen when time passes; every process does it, so that none is needed."""
    while True:
        with suppress(Unavailable):
            await link.call("reap", within_s=REAP_S)
        await asyncio.sleep(REAP_S * random.uniform(0.8, 1.2))


def _entry(raw: bytes, timings: bytes) -> Entry:
    """An entry of the log, with the terminal one's timings as the functions write them."""
    entry = decode_entry(raw)
    if not timings:
        return entry
    queue_s, ttft_s, total_s = (None if ms == b"-" else int(ms) / 1000 for ms in timings.split())
    assert total_s is not None
    return replace(entry, timings=Timings(queue_s, ttft_s, total_s))
