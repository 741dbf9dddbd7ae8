"""What only the in-process broker has: the calls of the composition root, its bounds, real timers."""

import asyncio
import time

import pytest

from model.request import Delta, Finish, FinishReason
from service.broker.base import Entry
from service.broker.memory import MemoryBroker
from service.errors import Unavailable
from tests.service.helpers_broker import STOP, FakeClock, ask, read, reason, token_ids


def broker(clock: FakeClock, max_waiting: int = 100) -> MemoryBroker:
    return MemoryBroker(max_waiting, 10_000, 60.0, clock, clock.call_later)


async def test_a_draining_broker_refuses_and_goes_on_with_what_it_has() -> None:
    memory = broker(FakeClock())
    await memory.submit([ask("a")])
    memory.stop_accepting("draining")
    with pytest.raises(Unavailable, match="draining"):
        await memory.submit([ask("b")])
    assert not (await memory.submit([ask("a")])).created
    assert len(await memory.claim(1)) == 1


async def test_end_all_leaves_every_request_one_terminal_entry() -> None:
    memory = broker(FakeClock())
    for id in ("ended", "doomed", "running", "waiting"):
        await memory.submit([ask(id)])
    await memory.claim(3)
    await memory.commit([Delta("ended", 0, (1,), finish=STOP), Delta("running", 0, (1,))])
    await memory.cancel("doomed", "default")
    await memory.end_all(Finish(FinishReason.ERROR, error="the server is shutting down"))
    ended, *others = [reason(await read(memory, id)) for id in ("ended", "doomed", "running", "waiting")]
    assert ended == FinishReason.STOP
    assert set(others) == {FinishReason.ERROR}
    load = await memory.load()
    assert (load.num_waiting, load.num_running) == (0, 0)
    assert await memory.commit([]) == {}


async def test_nothing_is_left_of_requests_whose_time_is_over() -> None:
    clock = FakeClock()
    memory = broker(clock)
    for round in range(5):
        for i in range(10):
            await memory.submit([ask(f"{round}.{i}", deadline_s=clock() + i)])
            await memory.submit([ask(f"{round}.{i}.far", deadline_s=clock() + 1e6)])
            await memory.cancel(f"{round}.{i}.far", "default")
        await memory.claim(5)
        clock.advance(100.0)
        await memory.commit([])
        clock.advance(100.0)
    assert not memory._records
    assert not memory._waiting
    assert not memory._doomed
    assert (memory._num_waiting_tokens, memory._num_running, clock.num_timers) == (0, 0, 0)


async def test_a_slow_reader_holds_up_nobody_and_misses_nothing() -> None:
    memory = broker(FakeClock())
    await memory.submit([ask("a")])
    await memory.claim(1)
    slow = memory.follow("a", "default")
    await memory.commit([Delta("a", 0, (0,))])
    assert await anext(slow) == Entry(0, (0,))
    for i in range(1, 50):
        await memory.commit([Delta("a", i, (i,))])
    await memory.commit([Delta("a", 50, finish=STOP)])
    assert token_ids(await read(memory, "a")) == list(range(50))
    assert token_ids([entry async for entry in slow]) == list(range(1, 50))


async def test_idle_time_does_not_count_as_slow_work() -> None:
    clock = FakeClock()
    memory = broker(clock)
    for i in range(3):
        await memory.submit([ask(f"a{i}")])
        await memory.claim(1)
        clock.advance(2.0)
        await memory.commit([Delta(f"a{i}", 0, finish=STOP)])
        clock.advance(1000.0)
    await memory.submit([ask("b")])
    assert (await memory.load()).retry_after_s == 2


async def test_real_timers_and_the_real_clock() -> None:
    memory = MemoryBroker(10, 1000)
    await memory.submit([ask("a", deadline_s=time.time() + 0.02)])
    async with asyncio.timeout(5):
        assert reason(await read(memory, "a")) == FinishReason.TIMEOUT
