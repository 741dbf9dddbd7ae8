"""Broker to engine and back: the only room that drives an engine.

Owns the engine's thread, what this worker holds, and the order of commits. It knows no HTTP, no text and no particular
broker. Two sides meet here and share no state: the event loop talks to the broker, the thread talks to the engine.
Down goes the inbox (jobs, ids to drop, None to stop); up come reports, one for each step, committed in order while the
thread is already computing the next. A step is handed up only when the one before it was committed: a slow broker slows
the engine, memory stays flat, and a request that was cancelled is computed for one more whole step at most.

Ledger. A request is held from its claim until its terminal delta was committed, a verdict took it away, or it was
released. Numbering the jobs keeps the two sides in agreement without a lock: a report says how many jobs the engine had
been given when it was made. Its room is therefore exact once the jobs after that number are taken off, and a delta that
was computed before its request was claimed again is recognised as stale.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from model.request import Delta, Request
from service.broker.base import Job, WorkerSide
from service.errors import MillraceError

RELEASED, ABANDONED = "released", "abandoned"  # fates beside finish reasons and verdicts: others may go on with it
STOP_S = 5.0  # how long a drain waits for the thread to come back from its last step

logger = logging.getLogger(__name__)
Stats = TypeVar("Stats", covariant=True)


class EngineFailed(MillraceError):
    """The engine raised, and the broker has back everything that it was computing. The cause is attached."""

    code = "engine_failed"


class EngineSide(Protocol[Stats]):
    """What a worker needs of an engine. Only the engine's thread calls it."""

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None: ...
    def cancel(self, id: str) -> None: ...
    def has_work(self) -> bool: ...
    def room(self) -> int: ...
    def step(self) -> list[Delta]: ...
    def stats(self) -> Stats: ...


@dataclass(frozen=True, slots=True)
class Report(Generic[Stats]):
    """One step, as its observer gets it: just before its deltas are committed, on the event loop."""

    deltas: list[Delta]
    step_s: float
    stats: Stats
    room: int
    num_jobs: int  # given to the engine before this step


@dataclass(slots=True, eq=False)
class Stay:
    """One request at this worker, from its claim on. Stamps are the worker's clock's; of tokens those drawn here count,
    once they are committed. `fate` is how it left: a finish reason, a verdict, or one of the two above."""

    job: Job
    number: int  # of its job
    claimed_s: float
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0
    fate: str = ""


class Worker(Generic[Stats]):
    """One engine at work. `observe` is called for every step, `left` for every request that leaves; both on the event
    loop, and must be quick. `clock` is monotonic seconds."""

    def __init__(
        self,
        broker: WorkerSide,
        engine: EngineSide[Stats],
        observe: Callable[[Report[Stats]], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
        left: Callable[[Stay], None] = lambda stay: None,
    ) -> None:
        self._left = left
        self._broker, self._engine, self._observe, self._clock = broker, engine, observe, clock
        self._inbox: queue.SimpleQueue[Job | str | None] = queue.SimpleQueue()
        self._reports: asyncio.Queue[Report[Stats] | Exception | None] = asyncio.Queue()
        self._committed: queue.SimpleQueue[None] = queue.SimpleQueue()  # leave to hand up a step
        self._committed.put(None)
        self._held: dict[str, Stay] = {}
        self._room = engine.room()
        self._num_jobs = 0  # put into the inbox
        self._num_jobs_in = 0  # of those, known to be in the engine
        self._reported = asyncio.Event()  # pulsed after every commit
        self._progress_s = clock()
        self._claims: asyncio.Task[None] | None = None
        self._draining = False
        self._stopped = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Claiming and computing: false before `run`, in a drain and after a failure."""
        return self._claims is not None and not self._claims.done() and not self._draining

    def progress_age_s(self) -> float:
        """Seconds since a step was last committed, or since work came in if that was later; 0 when idle."""
        return self._clock() - self._progress_s if self._held else 0.0

    async def run(self) -> None:
        """Work until `drain`. Raises `EngineFailed` once everything held was abandoned."""
        if self._draining:
            return
        loop = asyncio.get_running_loop()

        def post(report: Report[Stats] | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._reports.put_nowait, report)

        self._claims = asyncio.create_task(self._claim(), name="claim")
        threading.Thread(target=self._compute, args=(post,), name="engine", daemon=True).start()
        try:
            while isinstance(report := await self._reports.get(), Report):
                await self._commit(report)
            await self._stop_claiming()
            if report is not None:
                await self._fail(report)
            await self._broker.release(list(self._held))
            self._all_leave(RELEASED)
        finally:
            self._claims.cancel()
            self._inbox.put(None)
            self._committed.put(None)  # the thread may be waiting for a commit that will not come
            self._stopped.set()
            self._reported.set()

    async def drain(self, drain_s: float) -> None:
        """Stop claiming, let what runs end within `drain_s`, then give the rest back to the broker and stop: `run`
        has returned, or is about to raise, when this returns."""
        self._draining = True
        if self._claims is None:
            return
        await self._stop_claiming()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._held and not self._stopped.is_set():
                    await self._reported.wait()
        self._inbox.put(None)
        try:
            async with asyncio.timeout(STOP_S):
                await self._stopped.wait()
        except TimeoutError:
            logger.error("the engine has not come back from its step for %.0f s; leaving it", STOP_S)
            self._reports.put_nowait(None)  # in its place
            await self._stopped.wait()

    # --- the event loop's side ---------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        """Nothing is awaited once `claim` has returned, so no claimed request is dropped on a cancellation."""
        try:
            while True:
                while (room := self._room - (self._num_jobs - self._num_jobs_in)) < 1:
                    await self._reported.wait()
                for job in await self._broker.claim(room):
                    self._take_in(job)
        except Exception as error:
            self._reports.put_nowait(error)

    def _take_in(self, job: Job) -> None:
        if not self._held:
            self._progress_s = self._clock()
        self._num_jobs += 1
        self._held[job.request.id] = Stay(job, self._num_jobs, self._clock())
        self._inbox.put(job)

    async def _stop_claiming(self) -> None:
        assert self._claims is not None
        self._claims.cancel()
        await asyncio.wait({self._claims})

    async def _commit(self, report: Report[Stats]) -> None:
        """Commit a step, follow the verdicts, and let the thread go on."""
        self._observe(report)
        step = self._current(report)
        verdicts = await self._broker.commit(step)
        self._progress_s = now_s = self._clock()
        for delta in step:
            stay = self._held[delta.id]
            if delta.token_ids:
                if stay.first_s is None:
                    stay.first_s = now_s
                stay.last_s = now_s
                stay.num_tokens += len(delta.token_ids)
            if delta.finish is not None:
                self._leave(delta.id, verdicts.get(delta.id, delta.finish.reason))
        for id, verdict in verdicts.items():
            self._leave(id, verdict)
            self._inbox.put(id)
        self._room, self._num_jobs_in = report.room, report.num_jobs
        self._committed.put(None)
        self._reported.set()
        self._reported.clear()

    def _current(self, report: Report[Stats]) -> list[Delta]:
        """The deltas of what is held, but for those from before it was claimed again."""
        held, num_jobs = self._held, report.num_jobs
        return [delta for delta in report.deltas if delta.id in held and held[delta.id].number <= num_jobs]

    def _leave(self, id: str, fate: str) -> None:
        stay = self._held.pop(id, None)
        if stay is not None:
            stay.fate = fate
            self._left(stay)

    def _all_leave(self, fate: str) -> None:
        for id in list(self._held):
            self._leave(id, fate)

    async def _fail(self, error: Exception) -> None:
        logger.error("the engine failed with %d requests in it", len(self._held), exc_info=error)
        await self._broker.abandon(list(self._held))
        self._all_leave(ABANDONED)
        raise EngineFailed("the engine failed") from error

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _compute(self, post: Callable[[Report[Stats] | Exception | None], None]) -> None:
        engine, num_jobs = self._engine, 0
        try:
            while True:
                inbox = self._take()
                if None in inbox:
                    break
                for command in inbox:
                    if isinstance(command, Job):
                        engine.add(command.request, command.so_far)
                        num_jobs += 1
                    elif command is not None:
                        engine.cancel(command)
                began_s = time.perf_counter()
                deltas = engine.step()
                step_s = time.perf_counter() - began_s
                self._committed.get()
                post(Report(deltas, step_s, engine.stats(), engine.room(), num_jobs))
            post(None)
        except Exception as error:
            post(error)

    def _take(self) -> list[Job | str | None]:
        """Everything in the inbox; waits for something if the engine has nothing to compute."""
        taken: list[Job | str | None] = []
        with suppress(queue.Empty):
            while True:
                taken.append(self._inbox.get(block=not taken and not self._engine.has_work()))
        return taken
