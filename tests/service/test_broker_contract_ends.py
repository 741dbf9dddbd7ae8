"""What every broker promises, run on each of them: how requests end, and what time does to them.

The other half is `test_broker_contract.py`. Waits leave seconds on both sides of what they are about, for a broker may
have a clock that does not stand still.
"""

from typing import Any

import pytest

from model.request import Delta, Finish, FinishReason
from service.broker.base import CANCELLED, OUT_OF_QUEUE_TIME, OUT_OF_TIME, IdempotencyKey, Timings, Verdict
from service.errors import RequestNotFound
from tests.service.helpers_broker import STOP, ask, ask_group, ending, read, reading, reason, token_ids, verdicts
from tests.service.helpers_rig import Limits, MakeBroker, Rig, claim, ids, running, submit

TOLERANCE_S = 1.0  # of measured times

# --- cancellation ----------------------------------------------------------------------------------------------------


async def test_a_queued_request_that_is_cancelled_ends_at_once(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, ask("a"), ask("b"))
    await rig.requests.cancel("a", "default")
    log = await read(rig.requests, "a")
    assert (token_ids(log), ending(log)) == ([], CANCELLED)
    assert (await rig.requests.load()).num_waiting == 1
    assert ids(await claim(rig)) == ["b"]


async def test_a_running_request_that_is_cancelled_ends_at_a_commit(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    await rig.worker.commit([Delta("a", 0, (1,))])
    await rig.requests.cancel("a", "default")
    assert await verdicts(rig.worker, "a", step=[Delta("b", 0, (5,))]) == {"a": Verdict.CANCELLED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), ending(log)) == ([1], CANCELLED)
    assert await rig.worker.commit([]) == {}


async def test_an_end_after_the_cancellation_comes_too_late(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.requests.cancel("a", "default")
    assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {"a": Verdict.CANCELLED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), ending(log)) == ([], CANCELLED)


async def test_a_cancellation_after_the_end_is_ignored(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)])
    await rig.requests.cancel("a", "default")
    await rig.requests.cancel("unknown", "default")
    assert await rig.worker.commit([]) == {}
    assert reason(await read(rig.requests, "a")) == FinishReason.STOP


# --- deadlines -------------------------------------------------------------------------------------------------------

TIMEOUT = Finish(FinishReason.TIMEOUT, stop_reason=OUT_OF_TIME)
QUEUE_TIMEOUT = Finish(FinishReason.TIMEOUT, stop_reason=OUT_OF_QUEUE_TIME)


@pytest.mark.parametrize(
    ("total_s", "queue_s", "finish"),
    [(10, None, TIMEOUT), (None, 10, QUEUE_TIMEOUT), (10, 20, TIMEOUT), (20, 10, QUEUE_TIMEOUT)],
)
async def test_a_queued_request_out_of_time_ends_at_once_by_the_first_of_its_deadlines(
    make_broker: MakeBroker, total_s: float | None, queue_s: float | None, finish: Finish
) -> None:
    rig = await make_broker()
    deadline_s = None if total_s is None else rig.now_s() + total_s
    queue_deadline_s = None if queue_s is None else rig.now_s() + queue_s
    await submit(rig, ask("a", deadline_s=deadline_s, queue_deadline_s=queue_deadline_s))
    await rig.pass_time(5.0)
    assert (await rig.requests.load()).num_waiting == 1
    await rig.pass_time(8.0)
    assert (await rig.requests.load()).num_waiting == 0
    assert ending(await read(rig.requests, "a")) == finish
    await rig.pass_time(15.0)
    assert ending(await read(rig.requests, "a")) == finish


async def test_the_queue_deadline_ends_with_the_first_claim(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    deadlines: dict[str, Any] = {"deadline_s": rig.now_s() + 30, "queue_deadline_s": rig.now_s() + 5}
    await running(rig, ask("a", **deadlines), ask("b", **deadlines))
    await rig.worker.release(["b"])
    await rig.pass_time(15.0)
    assert (await rig.requests.load()).num_waiting == 1
    assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {}
    await rig.pass_time(25.0)
    assert ending(await read(rig.requests, "b")) == TIMEOUT


async def test_a_running_request_out_of_time_ends_at_a_commit(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", deadline_s=rig.now_s() + 5), ask("b", deadline_s=rig.now_s() + 5))
    await rig.worker.commit([Delta("a", 0, (1,))])
    await rig.pass_time(8.0)
    await rig.requests.cancel("a", "default")  # too late to be the reason
    found = await verdicts(rig.worker, "a", "b", step=[Delta("a", 1, (2,))])
    assert found == {"a": Verdict.EXPIRED, "b": Verdict.EXPIRED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), ending(log)) == ([1], TIMEOUT)


# --- orphans ---------------------------------------------------------------------------------------------------------


async def in_state(rig: Rig, state: str, orphan_s: float | None) -> None:
    """Request `a`, just submitted: waiting, running, or released and waiting again."""
    await submit(rig, ask("a", orphan_s=orphan_s))
    if state != "waiting":
        await claim(rig)
    if state == "released":
        await rig.worker.release(["a"])


async def is_cancelled(rig: Rig, state: str) -> bool:
    """Whether it has ended or is to end; True is the end of it."""
    if state == "running":
        return await rig.worker.commit([Delta("a", 0)]) == {"a": Verdict.CANCELLED}
    return (await rig.requests.load()).num_waiting == 0


STATES = pytest.mark.parametrize("state", ["waiting", "running", "released"])


@STATES
async def test_an_orphan_that_nobody_ever_followed_is_cancelled(make_broker: MakeBroker, state: str) -> None:
    rig = await make_broker()
    await in_state(rig, state, orphan_s=30.0)
    await rig.pass_time(20.0)
    assert not await is_cancelled(rig, state)
    await rig.pass_time(20.0)
    assert await is_cancelled(rig, state)
    assert ending(await read(rig.requests, "a")) == CANCELLED


@STATES
async def test_what_is_followed_is_no_orphan_until_the_last_reader_left(make_broker: MakeBroker, state: str) -> None:
    rig = await make_broker()
    await in_state(rig, state, orphan_s=30.0)
    await rig.pass_time(20.0)
    async with reading(rig.requests, "a"):
        async with reading(rig.requests, "a"):
            await rig.pass_time(50.0)
        await rig.pass_time(50.0)
        assert not await is_cancelled(rig, state)
    await rig.pass_time(20.0)
    async with reading(rig.requests, "a"):
        await rig.pass_time(0.0)
    await rig.pass_time(20.0)
    assert not await is_cancelled(rig, state)
    await rig.pass_time(20.0)
    assert await is_cancelled(rig, state)


@STATES
async def test_a_request_that_needs_no_reader_is_never_an_orphan(make_broker: MakeBroker, state: str) -> None:
    rig = await make_broker()
    await in_state(rig, state, orphan_s=None)
    await rig.pass_time(50.0)
    async with reading(rig.requests, "a"):
        await rig.pass_time(0.0)
    await rig.pass_time(500.0)
    assert not await is_cancelled(rig, state)


async def test_what_has_ended_is_no_orphan(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", orphan_s=10.0))
    await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)])
    assert ending(await read(rig.requests, "a")) == STOP
    await rig.pass_time(30.0)
    assert await rig.worker.commit([]) == {}
    assert ending(await read(rig.requests, "a")) == STOP


# --- timings and load ------------------------------------------------------------------------------------------------


def about(seconds: float | None) -> object:
    return None if seconds is None else pytest.approx(seconds, abs=TOLERANCE_S)


async def timings(rig: Rig, id: str) -> Timings:
    end = (await read(rig.requests, id))[-1].timings
    assert end is not None
    assert all(value is None or value == round(value, 6) for value in (end.queue_s, end.ttft_s, end.total_s))
    return end


async def test_times_run_from_submit_to_the_first_claim_the_first_token_and_the_end(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, ask("a"))
    await rig.pass_time(20.0)
    await claim(rig)
    await rig.worker.release(["a"])
    await rig.pass_time(10.0)
    await claim(rig)
    for start in range(2):
        await rig.worker.commit([Delta("a", start, (1,))])
        await rig.pass_time(10.0)
    await rig.worker.commit([Delta("a", 2, (2,), finish=STOP)])
    assert await timings(rig, "a") == Timings(about(20), about(30), about(50))  # type: ignore[arg-type]


async def test_what_never_came_has_no_time(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("claimed"), ask("at once"))
    await submit(rig, ask("waiting"))
    await rig.pass_time(10.01234567)
    await rig.requests.cancel("waiting", "default")
    await rig.worker.commit([Delta("claimed", 0, finish=STOP), Delta("at once", 0, (1,), finish=STOP)])
    found = [await timings(rig, id) for id in ("waiting", "claimed", "at once")]
    expected = [(None, None, 10), (0, None, 10), (0, 10, 10)]
    assert found == [Timings(*map(about, times)) for times in expected]  # type: ignore[arg-type]


async def test_a_group_is_kept_until_its_last_sequence_has_been_over_for_long_enough(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(keep_s=10.0))
    await rig.requests.submit(group := ask_group("a", 2), IdempotencyKey("k", "body"))
    await claim(rig)
    await rig.worker.commit([Delta("a.0", 0, (7,), finish=STOP)])
    await rig.pass_time(20.0)
    assert not (await rig.requests.submit(ask_group("b", 2), IdempotencyKey("k", "body"))).created
    await rig.worker.commit([Delta("a.1", 0, (8,), finish=STOP)])
    await rig.pass_time(8.0)
    assert await rig.requests.lookup("a", "default") == tuple(group)
    assert [token_ids(await read(rig.requests, request.id)) for request in group] == [[7], [8]]
    await rig.pass_time(4.0)
    with pytest.raises(RequestNotFound):
        await rig.requests.lookup("a", "default")
    assert (await rig.requests.submit(ask_group("b", 2), IdempotencyKey("k", "body"))).created


async def test_load_tells_what_waits_and_runs(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(max_waiting=1))
    await running(rig, ask("a"))
    await rig.requests.submit([ask("b")])
    await rig.pass_time(10.0)
    load = await rig.requests.load()
    assert (load.num_waiting, load.num_running, load.full) == (1, 1, True)
    assert load.oldest_wait_s == about(10.0)
    await claim(rig)
    load = await rig.requests.load()
    assert (load.num_waiting, load.num_running, load.full, load.oldest_wait_s) == (0, 2, False, 0.0)


async def test_retry_after_follows_the_measured_throughput(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, *[ask(f"a{i}") for i in range(3)])
    for i in range(3):
        await rig.pass_time(4.0)
        await rig.worker.commit([Delta(f"a{i}", 0, finish=STOP)])
    for i in range(20):
        await rig.requests.submit([ask(f"b{i}")])
        told = (await rig.requests.load()).retry_after_s
        assert min(60, 4 * (i + 1)) <= told <= min(60, 5 * (i + 1))


# --- the books -------------------------------------------------------------------------------------------------------


async def test_the_books_say_what_became_of_everything(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"), ask("c"))
    await submit(rig, ask("d"), ask("e", queue_deadline_s=rig.now_s() + 5))
    books = await rig.requests.books()
    assert (books.num_accepted, books.num_running, books.num_waiting, sum(books.num_ended.values())) == (5, 3, 2, 0)
    await rig.requests.cancel("a", "default")
    await rig.worker.commit([Delta("b", 0, (1,), finish=STOP), Delta("a", 0, (1,))])
    await rig.worker.release(["c"])
    await rig.pass_time(10.0)
    books = await rig.requests.books()
    assert (books.num_accepted, books.num_running, books.num_waiting) == (5, 0, 2)
    assert books.num_ended == {"stop": 1, "length": 0, "cancelled": 1, "timeout": 1, "error": 0}
