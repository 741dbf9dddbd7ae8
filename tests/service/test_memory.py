"""What only the in-process broker has: the calls of the composition root, its bounds, real timers."""

import asyncio
import time

import pytest

from model.request import Delta, Finish, FinishReason
from service.broker.base import Entry, IdempotencyKey, Timings
from service.broker.memory import FAILURE, MemoryBroker
from service.errors import IdempotencyConflict, Unavailable
from tests.service.helpers_broker import STOP, FakeClock, ask, ask_group, ending, read, reading, reason, token_ids


def broker(clock: FakeClock, max_waiting: int = 100) -> MemoryBroker:
    return MemoryBroker(max_waiting, 10_000, 60.0, None, clock, clock.call_later)


async def test_a_draining_broker_refuses_and_goes_on_with_what_it_has() -> None:
    memory = broker(FakeClock())
    await memory.submit([ask("a")], IdempotencyKey("k", "body"))
    memory.stop_accepting("draining")
    with pytest.raises(Unavailable, match="draining"):
        await memory.submit([ask("b")], IdempotencyKey("new", "body"))
    assert not (await memory.submit([ask("a")])).created
    assert (await memory.submit([ask("b")], IdempotencyKey("k", "body"))).id == "a"
    with pytest.raises(IdempotencyConflict):
        await memory.submit([ask("b")], IdempotencyKey("k", "other"))
    assert len(await memory.claim(1)) == 1


async def test_what_can_not_be_written_is_not_queued() -> None:
    memory = broker(clock := FakeClock())
    with pytest.raises(UnicodeEncodeError):
        await memory.submit([*ask_group("a", 2, deadline_s=2000.0), ask("a.2", model="\ud800")])
    assert (await memory.load()).num_waiting == clock.num_timers == 0
    assert (await memory.submit([ask("a")])).created


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


async def test_an_abandoned_request_says_nothing_of_the_cause() -> None:
    memory = broker(FakeClock())
    await memory.submit([ask("a")])
    await memory.claim(1)
    await memory.abandon(["a"])
    assert ending(await read(memory, "a")) == Finish(FinishReason.ERROR, error=FAILURE)


async def test_nothing_is_left_of_requests_whose_time_is_over() -> None:
    clock = FakeClock()
    memory = broker(clock)
    for round in range(5):
        for i in range(10):
            id, far_s = f"{round}.{i}", clock() + 1e6
            await memory.submit([ask(id, tenant=id, deadline_s=clock() + i, queue_deadline_s=clock() + 5)])
            await memory.submit(ask_group(f"{id}.all", 2, orphan_s=1e6, priority=-1), IdempotencyKey(id, "body"))
            await memory.submit([ask(f"{id}.far", deadline_s=far_s, queue_deadline_s=far_s, orphan_s=20.0)])
            async with reading(memory, f"{id}.all.0"), reading(memory, f"{id}.far"):
                await asyncio.sleep(0)
            for choice in range(2):
                await memory.cancel(f"{id}.all.{choice}", "default")
        await memory.claim(5)
        clock.advance(100.0)
        await memory.commit([])
        clock.advance(100.0)
    assert not (memory._records or memory._groups or memory._keys or memory._doomed)
    assert (len(memory._queue), memory._queue.num_tenants) == (0, 0)
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
    rest = [entry async for entry in slow]
    assert token_ids(rest) == list(range(1, 50))
    assert rest[-1].timings == Timings(0.0, 0.0, 0.0)


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
    await memory.submit([ask("orphan", orphan_s=0.01)])
    await memory.submit([ask("late", deadline_s=time.time() + 0.05)])
    assert reason(await read(memory, "late")) == FinishReason.TIMEOUT
    assert reason(await read(memory, "orphan")) == FinishReason.CANCELLED
