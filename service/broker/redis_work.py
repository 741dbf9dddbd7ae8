"""The worker's side of the queue in Redis: claiming, committing, and staying alive in the eyes of the others.

Owns the tokens of what this worker holds, and its heartbeat. A write is accepted only with the token of its claim, so a
worker that was given up for dead can do no harm when it wakes. It knows no engine.

Ledger. A request is in `_held` from its claim until its end was committed, a verdict took it away, or it was given
back. One that comes while an older claim of it is still here goes back at once: the worker must first have been told
that it lost the older one, or it would mistake that verdict for one on the new.
"""

import asyncio
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import msgpack

from model.request import Delta
from service.broker.base import Job, Verdict
from service.broker.codec import CodecError, decode_entry, decode_request, encode_entry
from service.broker.redis import Link, WorkerInfo
from service.broker.redis_requests import reap_for_ever
from service.errors import Unavailable

POLL_S = 0.5  # between two looks at the queue, should the bell not have been heard
VERDICTS = {-1: Verdict.FENCED, -2: Verdict.CANCELLED, -3: Verdict.EXPIRED}

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    token: str
    num_tokens: int  # in the log


class RedisWork:
    """`WorkerSide` over Redis, for one worker: its `name` is used once. The lease is renewed four times in its length.

    While Redis is away, calls wait; the lease does not run out meanwhile, for its clock stands still.
    """

    def __init__(self, link: Link, name: str, info: WorkerInfo, lease_s: float = 3.0) -> None:
        self._link, self._name, self._info, self._lease_s = link, name, info, lease_s
        self._held: dict[str, _Held] = {}
        self._asked_for: set[str] = set()  # Redis has something to say of these
        self._computed: dict[str, int] = {}  # how far prompts have come; told with the next heartbeat
        self._bell = asyncio.Event()
        self._num_commits = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._returning: asyncio.Task[None] | None = None
        self.num_redelivered = 0  # claimed here, and before by somebody
        self.num_taken_over = 0  # of those, with ids that another worker made

    async def open(self) -> None:
        """Announce this worker and keep it alive. The link is open."""
        self._link.listen({f"bell:{self._info.queue}": self._on_bell, f"work:{self._name}": self._on_word})
        await self._beat()
        self._tasks = [asyncio.create_task(work) for work in (self._beat_for_ever(), reap_for_ever(self._link))]

    async def close(self) -> None:
        """Take the announcement back. What is still held counts as lost in a crash: release it before."""
        if self._returning is not None:
            await asyncio.wait({self._returning}, timeout=self._lease_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Unavailable):
            await self._link.call("lose", self._name, within_s=self._lease_s)

    # --- the contract ------------------------------------------------------------------------------------------------

    async def claim(self, room: int) -> list[Job]:
        """A claim that is cancelled on its way gives back what it gets."""
        while True:
            self._bell.clear()
            claiming = asyncio.create_task(self._claim(room))
            try:
                jobs = await asyncio.shield(claiming)
            except asyncio.CancelledError:
                self._returning = asyncio.create_task(self._return(claiming))
                raise
            if jobs:
                return jobs
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._bell.wait()

    async def commit(self, step: Sequence[Delta]) -> Mapping[str, Verdict]:
        """Waits for Redis as long as it takes."""
        verdicts = {delta.id: Verdict.FENCED for delta in step if delta.id not in self._held}
        asked = [delta for delta in step if delta.id in self._held and (delta.token_ids or delta.finish)]
        known = {delta.id for delta in asked}
        self._computed.update((delta.id, delta.num_computed) for delta in step if delta.num_computed)
        asked += [Delta(id, held.num_tokens) for id in self._asked_for - known if (held := self._held.get(id))]
        self._asked_for.clear()
        if not asked:
            return verdicts
        self._num_commits += 1
        tokens = [self._held[delta.id].token for delta in asked]
        packed = msgpack.packb(
            [
                (delta.id, token, delta.start, len(delta.token_ids), encode_entry(delta), delta.finish is not None)
                for delta, token in zip(asked, tokens, strict=True)
            ],
            use_bin_type=False,  # Redis's reader is of an older format
        )
        codes = await self._link.call("commit", self._name, self._lease_ms, self._num_commits, packed)
        for delta, token, code in zip(asked, tokens, codes, strict=True):
            held = self._held.get(delta.id)
            if held is None or held.token != token:
                continue
            if code in VERDICTS:
                verdicts[delta.id] = VERDICTS[code]
            if code in VERDICTS or delta.finish:
                del self._held[delta.id]
            else:
                held.num_tokens += len(delta.token_ids)
        return verdicts

    async def release(self, ids: Iterable[str]) -> None:
        await self._give_up("release", ids)

    async def abandon(self, ids: Iterable[str]) -> None:
        await self._give_up("abandon", ids)

    # --- calls -------------------------------------------------------------------------------------------------------

    @property
    def _lease_ms(self) -> int:
        return int(self._lease_s * 1000)

    async def _claim(self, room: int) -> list[Job]:
        token = secrets.token_hex(16)
        jobs, unwanted, unreadable = [], [], []
        asked = (self._name, self._info.queue, token, room, self._lease_ms)
        for id, payload, num_claims, *log in await self._link.call("claim", *asked):
            rid = id.decode()
            if rid in self._held:
                unwanted += [rid, token]
                continue
            try:
                so_far = tuple(token_id for raw in log for token_id in decode_entry(raw).token_ids)
                jobs.append(Job(decode_request(payload), so_far))
            except CodecError as error:
                logger.error("request %s can't be read: %s", rid, error)
                unreadable += [rid, token]
                continue
            self._held[rid] = _Held(token, len(so_far))
            self.num_redelivered += num_claims > 1
            self.num_taken_over += num_claims > 1 and bool(so_far)
        if unwanted:
            await self._link.call("release", *unwanted)
        if unreadable:
            await self._link.call("abandon", *unreadable)
        return jobs

    async def _return(self, claiming: "asyncio.Task[list[Job]]") -> None:
        await self.release([job.request.id for job in await claiming])

    async def _give_up(self, how: str, ids: Iterable[str]) -> None:
        pairs = [part for id in ids if (held := self._held.pop(id, None)) for part in (id, held.token)]
        if pairs:
            await self._link.call(how, *pairs)

    async def _beat(self) -> None:
        pairs = [(id, held.token) for id, held in self._held.items()]
        told = msgpack.packb(asdict(self._info))
        flat = [part for pair in pairs for part in pair]
        codes = await self._link.call("beat", self._name, self._lease_ms, told, *flat, within_s=self._lease_s)
        self._asked_for.update(id for (id, _), code in zip(pairs, codes, strict=True) if code in VERDICTS)
        computed, self._computed = self._computed, {}
        told_of = [(id, held.token, num) for id, num in computed.items() if (held := self._held.get(id))]
        if told_of:
            await self._link.call("progress", *(part for each in told_of for part in each), within_s=self._lease_s)

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            with suppress(Unavailable):
                await self._beat()

    def _on_bell(self, data: bytes) -> None:
        self._bell.set()

    def _on_word(self, data: bytes) -> None:
        self._asked_for.add(data.decode())
