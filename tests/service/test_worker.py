"""The worker between a real in-process broker and an engine that only counts."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from model.request import Delta, Finish, FinishReason, Request
from service.broker.base import Job, Verdict
from service.broker.memory import FAILURE, MemoryBroker
from service.worker import EngineFailed, Report, Stay, Worker
from tests.service.helpers_broker import FakeClock, ask, ask_group, ending, read, reason, token_ids

SHUT_DOWN = Finish(FinishReason.ERROR, error="the server is shutting down")


class CountingEngine:
    """Output id i of every request is i, one a step. `gate` lets steps through; `stats` is what it holds."""

    def __init__(self, seats: int = 8, num_steps: int = 10_000) -> None:
        self.seats, self.num_steps = seats, 0
        self.gate, self.second_step = threading.Semaphore(num_steps), threading.Event()
        self.rows: dict[str, tuple[Request, int]] = {}
        self.error: Exception | None = None

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None:
        assert request.id not in self.rows
        self.rows[request.id] = (request, len(so_far))

    def cancel(self, id: str) -> None:
        self.rows.pop(id, None)

    def has_work(self) -> bool:
        return bool(self.rows)

    def room(self) -> int:
        return self.seats - len(self.rows)

    def stats(self) -> frozenset[str]:
        return frozenset(self.rows)

    def step(self) -> list[Delta]:
        if not self.rows:
            return []
        self.gate.acquire()
        if self.error:
            raise self.error
        self.num_steps += 1
        if self.num_steps == 2:
            self.second_step.set()
        return [self._advance(id) for id in list(self.rows)]

    def _advance(self, id: str) -> Delta:
        request, count = self.rows[id]
        last = count + 1 == request.sampling.max_tokens
        self.rows[id] = (request, count + 1)
        if last:
            del self.rows[id]
        return Delta(id, count, (count,), finish=Finish(FinishReason.LENGTH) if last else None)


class House:
    """Broker, engine and worker at work. Every report is queued for the test to wait on."""

    def __init__(self, engine: CountingEngine) -> None:
        self.engine, self.clock = engine, FakeClock()
        self.broker = MemoryBroker(100, 10_000, 60.0, None, self.clock, self.clock.call_later)
        self.reports: asyncio.Queue[Report[frozenset[str]]] = asyncio.Queue()
        self.worker = Worker(self.broker, engine, self.reports.put_nowait, self.clock)
        self.work = asyncio.create_task(self.worker.run())

    async def until_engine_holds(self, ids: set[str]) -> int:
        """How many reports it took."""
        num = 1
        while (await self.reports.get()).stats != ids:
            num += 1
        return num

    async def stop(self, drain_s: float = 30.0) -> None:
        """In the order of a real shutdown."""
        self.broker.stop_accepting("draining")
        await self.worker.drain(drain_s)
        await self.broker.end_all(SHUT_DOWN)


@asynccontextmanager
async def house(engine: CountingEngine) -> AsyncIterator[House]:
    it = House(engine)
    try:
        yield it
    finally:
        engine.gate.release(10_000)
        await it.stop()
        await asyncio.wait({it.work})


async def test_requests_run_to_their_end_with_every_id_once() -> None:
    async with house(CountingEngine(seats=3)) as it:
        requests = [ask(f"r{i}", max_tokens=1 + i) for i in range(20)]
        for request in requests:
            await it.broker.submit([request])
        logs = await asyncio.gather(*[read(it.broker, request.id) for request in requests])
        assert [token_ids(log) for log in logs] == [list(range(1 + i)) for i in range(20)]
        assert {reason(log) for log in logs} == {FinishReason.LENGTH}
        assert it.worker.alive


async def test_no_more_is_claimed_than_the_engine_has_room_for() -> None:
    async with house(CountingEngine(seats=2, num_steps=0)) as it:
        await it.broker.submit(ask_group("g", 3))
        it.engine.gate.release()
        await it.until_engine_holds({"g.0", "g.1"})
        load = await it.broker.load()
        assert (load.num_running, load.num_waiting) == (2, 1)


async def test_a_cancelled_request_leaves_the_engine_within_a_step() -> None:
    async with house(CountingEngine(num_steps=0)) as it:
        await it.broker.submit([ask("a", max_tokens=1000)])
        it.engine.gate.release()
        await it.until_engine_holds({"a"})
        await it.broker.cancel("a", "default")
        it.engine.gate.release(10)
        # the step in progress, a whole one, and the one that finds it gone
        assert await it.until_engine_holds(set()) <= 3
        assert reason(await read(it.broker, "a")) == FinishReason.CANCELLED


async def test_the_seat_of_a_cancelled_request_is_given_to_the_next() -> None:
    async with house(CountingEngine(seats=1)) as it:
        await it.broker.submit([ask("a", max_tokens=10**6)])
        await it.until_engine_holds({"a"})
        await it.broker.submit([ask("b")])
        await it.broker.cancel("a", "default")
        assert token_ids(await read(it.broker, "b")) == [0, 1, 2, 3]


async def test_a_queued_request_that_is_cancelled_never_reaches_the_engine() -> None:
    async with house(CountingEngine(seats=1, num_steps=0)) as it:
        await it.broker.submit([ask("a")])
        it.engine.gate.release()
        await it.until_engine_holds({"a"})
        await it.broker.submit([ask("b")])
        await it.broker.cancel("b", "default")
        it.engine.gate.release(100)
        await read(it.broker, "a")
        assert reason(await read(it.broker, "b")) == FinishReason.CANCELLED
        assert not any("b" in it.reports.get_nowait().stats for _ in range(it.reports.qsize()))


async def test_a_request_out_of_time_leaves_the_engine() -> None:
    async with house(CountingEngine(num_steps=0)) as it:
        await it.broker.submit([ask("a", max_tokens=1000, deadline_s=it.clock() + 5)])
        it.engine.gate.release()
        await it.until_engine_holds({"a"})
        it.clock.advance(6.0)
        it.engine.gate.release(10)
        await it.until_engine_holds(set())
        assert reason(await read(it.broker, "a")) == FinishReason.TIMEOUT


async def test_a_job_with_ids_goes_on_behind_them() -> None:
    it = House(CountingEngine())
    await it.broker.submit([ask("a")])
    await it.broker.claim(1)
    await it.broker.commit([Delta("a", 0, (0, 1))])
    await it.broker.release(["a"])
    assert token_ids(await read(it.broker, "a")) == [0, 1, 2, 3]
    await it.stop()


# --- failure and shutdown --------------------------------------------------------------------------------------------


async def test_an_engine_that_raises_ends_what_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    it = House(CountingEngine(num_steps=1))
    await it.broker.submit(ask_group("a", 2))
    await it.until_engine_holds({"a.0", "a.1"})
    it.engine.error = RuntimeError("boom in /some/file.py")
    it.engine.gate.release()
    with caplog.at_level(logging.ERROR), pytest.raises(EngineFailed):
        await it.work
    for id in ("a.0", "a.1"):
        log = await read(it.broker, id)
        assert (token_ids(log), ending(log)) == ([0], Finish(FinishReason.ERROR, error=FAILURE))
    assert not it.worker.alive
    (record,) = caplog.records
    assert record.exc_info is not None
    await it.worker.drain(1.0)


async def test_a_drain_lets_what_runs_end_and_claims_no_more() -> None:
    async with house(CountingEngine(seats=1, num_steps=0)) as it:
        await it.broker.submit([ask("a")])
        it.engine.gate.release()
        await it.until_engine_holds({"a"})
        await it.broker.submit([ask("b")])
        stop = asyncio.create_task(it.stop())
        await asyncio.sleep(0)
        assert not it.worker.alive
        it.engine.gate.release(100)
        await stop
        assert reason(await read(it.broker, "a")) == FinishReason.LENGTH
        log = await read(it.broker, "b")
        assert ending(log) == SHUT_DOWN
        assert token_ids(log) == []


async def test_what_a_drain_has_no_time_for_is_given_back_and_ended() -> None:
    async with house(CountingEngine()) as it:
        await it.broker.submit([ask("a", max_tokens=10**6)])
        await it.until_engine_holds({"a"})
        await it.stop(drain_s=0.0)
        log = await read(it.broker, "a")
        assert ending(log) == SHUT_DOWN
        assert token_ids(log) == list(range(len(token_ids(log))))
        await it.work


async def test_an_idle_worker_stops_at_once() -> None:
    async with house(CountingEngine()) as it:
        await it.stop()
        await it.work
        assert not it.worker.alive


async def test_an_engine_that_hangs_does_not_hold_up_a_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.STOP_S", 0.01)
    async with house(CountingEngine(num_steps=1)) as it:
        await it.broker.submit([ask("a")])
        await it.until_engine_holds({"a"})
        await it.stop(drain_s=0.0)
        await it.work
        log = await read(it.broker, "a")
        assert (token_ids(log), ending(log)) == ([0], SHUT_DOWN)


async def test_progress_is_measured_only_while_there_is_work() -> None:
    async with house(CountingEngine(num_steps=0)) as it:
        it.clock.advance(100.0)
        assert it.worker.progress_age_s() == 0.0
        await it.broker.submit([ask("a", max_tokens=2)])
        for _ in range(5):  # to the claim
            await asyncio.sleep(0)
        it.clock.advance(7.0)
        assert it.worker.progress_age_s() == 7.0
        it.engine.gate.release()
        await it.until_engine_holds({"a"})
        assert it.worker.progress_age_s() == 0.0
        it.engine.gate.release()
        await read(it.broker, "a")
        assert it.worker.progress_age_s() == 0.0


# --- the order of commits --------------------------------------------------------------------------------------------


class ScriptedBroker:
    """One job, the next once a verdict was given; every commit goes through `on_commit`."""

    def __init__(self, on_commit: Callable[[Sequence[Delta]], Awaitable[object]], *jobs: Job) -> None:
        self.on_commit, self.jobs, self.next = on_commit, list(jobs), asyncio.Event()
        self.next.set()
        self.verdicts: dict[str, Verdict] = {}
        self.committed: list[Delta] = []
        self.ended = asyncio.Event()

    async def claim(self, room: int) -> list[Job]:
        await self.next.wait()
        self.next.clear()
        return [self.jobs.pop(0)]

    async def commit(self, step: Sequence[Delta]) -> Mapping[str, Verdict]:
        await self.on_commit(step)
        self.committed += step
        if any(delta.finish for delta in step):
            self.ended.set()
        verdicts, self.verdicts = self.verdicts, {}
        if verdicts and self.jobs:
            self.next.set()
        return verdicts

    async def release(self, ids: Iterable[str]) -> None: ...

    async def abandon(self, ids: Iterable[str]) -> None: ...


async def test_the_next_step_is_computed_while_one_is_committed() -> None:
    engine = CountingEngine()

    async def until_the_second_step(step: Sequence[Delta]) -> None:
        assert await asyncio.to_thread(engine.second_step.wait, 10)

    broker = ScriptedBroker(until_the_second_step, Job(ask("a")))
    work = asyncio.create_task(Worker(broker, engine).run())
    await broker.ended.wait()
    work.cancel()


async def test_steps_are_committed_in_order_and_the_engine_waits_for_a_slow_broker() -> None:
    engine, ahead = CountingEngine(), []

    async def slow(step: Sequence[Delta]) -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        ahead.append(engine.num_steps - step[0].start)

    broker = ScriptedBroker(slow, Job(ask("a", max_tokens=100)))
    work = asyncio.create_task(Worker(broker, engine).run())
    await broker.ended.wait()
    assert [delta.start for delta in broker.committed] == list(range(100))
    assert max(ahead) <= 2  # the step being committed, and the next
    work.cancel()


async def test_ids_from_before_a_request_was_claimed_again_are_not_committed() -> None:
    engine = CountingEngine()

    async def until_the_second_step(step: Sequence[Delta]) -> None:
        await asyncio.to_thread(engine.second_step.wait, 10)

    asked = ask("a", max_tokens=6)
    broker = ScriptedBroker(until_the_second_step, Job(asked), Job(asked, (0,)))
    broker.verdicts = {"a": Verdict.FENCED}
    work = asyncio.create_task(Worker(broker, engine).run())
    await broker.ended.wait()
    assert [delta.start for delta in broker.committed] == list(range(6))
    work.cancel()


async def test_who_leaves_is_told_once_with_what_it_took() -> None:
    broker, left = MemoryBroker(100, 10_000), asyncio.Queue[Stay]()
    engine = CountingEngine(num_steps=3)
    work = asyncio.create_task(Worker(broker, engine, left=left.put_nowait).run())
    for request in (ask("a", max_tokens=3), ask("b", max_tokens=99)):
        await broker.submit([request])
    first = await left.get()
    await broker.cancel("b", "default")
    engine.gate.release(10)
    second = await left.get()
    assert (first.job.request.id, first.fate, first.num_tokens) == ("a", "length", 3)
    assert first.first_s is not None and first.claimed_s <= first.first_s <= first.last_s
    assert (second.job.request.id, second.fate, left.empty()) == ("b", "cancelled", True)
    work.cancel()
