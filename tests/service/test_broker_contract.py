"""What every broker promises (`service/broker/base.py`), run on each of them.

A broker joins by adding a maker to `MAKERS`: it gets limits and yields a `Rig`. Nothing here knows which one it has.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import pytest

from model.request import Delta, Finish, FinishReason, Request, SamplingParams, TextOptions, TokenLogprob
from service.broker.base import Entry, Job, RequestSide, Verdict, WorkerSide
from service.broker.memory import MemoryBroker
from service.errors import Overloaded, RequestNotFound
from tests.service.helpers_broker import STOP, FakeClock, ask, read, reason, token_ids


@dataclass
class Rig:
    """A broker with one door and one worker. `pass_time` returns when what became due was done."""

    requests: RequestSide
    worker: WorkerSide
    now_s: Callable[[], float]
    pass_time: Callable[[float], Awaitable[None]]


class MakeBroker(Protocol):
    async def __call__(
        self, *, max_waiting: int = 100, max_waiting_tokens: int = 10_000, keep_s: float = 60.0
    ) -> Rig: ...


async def memory(max_waiting: int, max_waiting_tokens: int, keep_s: float) -> Rig:
    clock = FakeClock()
    broker = MemoryBroker(max_waiting, max_waiting_tokens, keep_s, clock, clock.call_later)

    async def pass_time(seconds: float) -> None:
        clock.advance(seconds)

    return Rig(broker, broker, clock, pass_time)


MAKERS = {"memory": memory}


@pytest.fixture(params=MAKERS)
async def make_broker(request: pytest.FixtureRequest) -> AsyncIterator[MakeBroker]:
    async def make(*, max_waiting: int = 100, max_waiting_tokens: int = 10_000, keep_s: float = 60.0) -> Rig:
        return await MAKERS[request.param](max_waiting, max_waiting_tokens, keep_s)

    yield make


async def running(rig: Rig, *asked: Request) -> None:
    """Submit and claim."""
    for request in asked:
        await rig.requests.submit([request])
    assert len(await rig.worker.claim(len(asked))) == len(asked)


def ids(jobs: list[Job]) -> list[str]:
    return [job.request.id for job in jobs]


# --- submit ----------------------------------------------------------------------------------------------------------


async def test_a_request_reaches_the_worker_as_it_was_submitted(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    sampling = SamplingParams(0.5, 3, logit_bias=((7, -1.5),), seed=2**63 - 1, stop_token_ids=(1, 2), num_logprobs=2)
    request = Request("a", (5, 6), sampling, TextOptions(("ö",), echo=True), "name", "me", 4, 1000.5, 2000.25)
    await rig.requests.submit([request])
    assert await rig.worker.claim(5) == [Job(request)]


async def test_a_group_is_admitted_by_number_all_or_none(make_broker: MakeBroker) -> None:
    rig = await make_broker(max_waiting=3)
    await rig.requests.submit([ask("a.0"), ask("a.1")])
    with pytest.raises(Overloaded) as refused:
        await rig.requests.submit([ask("b.0"), ask("b.1")])
    assert (refused.value.num_waiting, refused.value.retry_after_s) == (2, 1)
    assert (await rig.requests.submit([ask("c")])).position == 2
    assert ids(await rig.worker.claim(9)) == ["a.0", "a.1", "c"]


async def test_admission_counts_prompt_tokens_and_running_ones_no_more(make_broker: MakeBroker) -> None:
    rig = await make_broker(max_waiting_tokens=10)
    await rig.requests.submit([ask("a", num_prompt=6)])
    with pytest.raises(Overloaded):
        await rig.requests.submit([ask("b", num_prompt=5)])
    await rig.requests.submit([ask("c", num_prompt=4)])
    assert (await rig.requests.load()).full
    await rig.worker.claim(1)
    await rig.requests.submit([ask("b", num_prompt=5)])


async def test_an_empty_queue_takes_a_group_that_would_never_fit(make_broker: MakeBroker) -> None:
    rig = await make_broker(max_waiting=2, max_waiting_tokens=10)
    await rig.requests.submit([ask(f"a.{i}", num_prompt=8) for i in range(4)])
    assert len(await rig.worker.claim(9)) == 4


async def test_the_same_request_submitted_again_is_found_again(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    assert (await rig.requests.submit([ask("a")])).created
    again = await rig.requests.submit([ask("a")])
    assert (again.id, again.created) == ("a", False)
    assert len(await rig.worker.claim(9)) == 1


# --- claim and release -----------------------------------------------------------------------------------------------


async def test_claims_go_by_priority_then_arrival(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    for id, priority in [("a", 1), ("b", 0), ("c", 1), ("d", 0)]:
        await rig.requests.submit([ask(id, priority=priority)])
    assert (await rig.requests.submit([ask("e", priority=0)])).position == 2
    assert ids(await rig.worker.claim(2)) == ["b", "d"]
    assert ids(await rig.worker.claim(9)) == ["e", "a", "c"]


async def test_a_claim_waits_and_when_cancelled_has_taken_nothing(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    claims = [asyncio.create_task(rig.worker.claim(1)) for _ in range(2)]
    await asyncio.sleep(0)
    await rig.requests.submit([ask("a")])
    claims[0].cancel()
    assert ids(await claims[1]) == ["a"]
    assert (await asyncio.gather(claims[0], return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_released_request_keeps_its_ids_and_its_place(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (10, 11))])
    await rig.requests.submit([ask("b")])
    await rig.worker.release(["a", "unknown"])
    assert await rig.worker.claim(9) == [Job(ask("a"), (10, 11)), Job(ask("b"))]
    await rig.worker.commit([Delta("a", 2, (12,), finish=STOP)])
    assert token_ids(await read(rig.requests, "a")) == [10, 11, 12]


# --- commit ----------------------------------------------------------------------------------------------------------


async def test_entries_arrive_as_committed(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    logprobs = (TokenLogprob(-0.5, ((1, -0.5), (2, -1.25))),)
    finish = Finish(FinishReason.STOP, stop_reason="end")
    assert await rig.worker.commit([Delta("a", 0, (1,), logprobs)]) == {}
    assert await rig.worker.commit([Delta("a", 1, (2,), logprobs, finish)]) == {}
    assert await read(rig.requests, "a") == [Entry(0, (1,), logprobs), Entry(1, (2,), logprobs, finish, queue_s=0.0)]


@pytest.mark.parametrize("start", [0, 2])
async def test_ids_that_do_not_continue_the_log_are_not_written(make_broker: MakeBroker, start: int) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    await rig.worker.commit([Delta("a", 0, (1,))])
    assert await rig.worker.commit([Delta("a", start, (7,)), Delta("b", 0, (2,))]) == {"a": Verdict.FENCED}
    (job,) = await rig.worker.claim(1)
    assert job == Job(ask("a"), (1,))


async def test_who_does_not_hold_a_request_is_fenced(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("ended"), ask("released"))
    await rig.worker.commit([Delta("ended", 0, finish=STOP)])
    await rig.worker.release(["released"])
    await rig.requests.submit([ask("waiting")])
    step = [Delta(id, 0, (1,)) for id in ("ended", "released", "waiting", "unknown")]
    assert await rig.worker.commit(step) == {delta.id: Verdict.FENCED for delta in step}
    assert token_ids(await read(rig.requests, "ended")) == []


# --- follow ----------------------------------------------------------------------------------------------------------


async def test_several_readers_follow_live_from_any_position(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a")])
    early = [asyncio.create_task(read(rig.requests, "a", after)) for after in (0, 2, 9)]
    await asyncio.sleep(0)
    await rig.worker.claim(1)
    await rig.worker.commit([Delta("a", 0, (10, 11, 12))])
    late = asyncio.create_task(read(rig.requests, "a", 1))
    await asyncio.sleep(0)
    await rig.worker.commit([Delta("a", 3, (13,))])
    await rig.worker.commit([Delta("a", 4, (14,), finish=STOP)])
    logs = [await reader for reader in [*early, late]] + [await read(rig.requests, "a", after) for after in (3, 5)]
    assert [token_ids(log) for log in logs] == [[10, 11, 12, 13, 14][n:] for n in (0, 2, 9, 1, 3, 5)]
    assert {reason(log) for log in logs} == {FinishReason.STOP}
    assert (logs[1][0].start, logs[3][0].start) == (2, 1)
    assert all(entry.token_ids or entry.finish for log in logs for entry in log)


async def test_log_probabilities_are_cut_with_their_ids(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (1, 2), (TokenLogprob(-1.0), TokenLogprob(-2.0)), STOP)])
    (entry,) = await read(rig.requests, "a", 1)
    assert (entry.start, entry.token_ids, entry.logprobs) == (1, (2,), (TokenLogprob(-2.0),))


async def test_a_reader_that_leaves_changes_nothing(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a")])
    reader = asyncio.create_task(read(rig.requests, "a"))
    await asyncio.sleep(0)
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    await rig.worker.claim(1)
    assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {}
    assert reason(await read(rig.requests, "a")) == FinishReason.STOP


async def test_the_log_is_kept_for_a_while_after_the_end(make_broker: MakeBroker) -> None:
    rig = await make_broker(keep_s=60.0)
    await running(rig, ask("a", deadline_s=rig.now_s() + 30))
    await rig.pass_time(20.0)
    await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)])
    await rig.pass_time(59.0)
    assert token_ids(await read(rig.requests, "a")) == [1]
    await rig.pass_time(2.0)
    with pytest.raises(RequestNotFound):
        await read(rig.requests, "a")


async def test_another_tenants_request_does_not_exist(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", tenant="me"))
    with pytest.raises(RequestNotFound):
        await read(rig.requests, "a", tenant="you")
    await rig.requests.cancel("a", "you")
    assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {}
    assert reason(await read(rig.requests, "a", tenant="me")) == FinishReason.STOP


# --- cancellation and deadlines --------------------------------------------------------------------------------------


async def test_a_queued_request_that_is_cancelled_ends_at_once(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a")])
    await rig.requests.submit([ask("b")])
    await rig.requests.cancel("a", "default")
    (end,) = await read(rig.requests, "a")
    assert end == Entry(0, finish=Finish(FinishReason.CANCELLED), queue_s=None)
    assert ids(await rig.worker.claim(9)) == ["b"]
    assert (await rig.requests.load()).num_waiting == 0


async def test_a_running_request_that_is_cancelled_ends_at_the_next_commit(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    await rig.worker.commit([Delta("a", 0, (1,))])
    await rig.requests.cancel("a", "default")
    assert await rig.worker.commit([Delta("b", 0, (5,))]) == {"a": Verdict.CANCELLED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), reason(log)) == ([1], FinishReason.CANCELLED)
    assert await rig.worker.commit([]) == {}


async def test_an_end_after_the_cancellation_comes_too_late(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.requests.cancel("a", "default")
    assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {"a": Verdict.CANCELLED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), reason(log)) == ([], FinishReason.CANCELLED)


async def test_a_cancellation_after_the_end_is_ignored(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)])
    await rig.requests.cancel("a", "default")
    await rig.requests.cancel("unknown", "default")
    assert await rig.worker.commit([]) == {}
    assert reason(await read(rig.requests, "a")) == FinishReason.STOP


async def test_a_cancelled_request_that_is_released_ends_instead(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.requests.cancel("a", "default")
    await rig.worker.release(["a"])
    assert await rig.worker.commit([]) == {}
    assert reason(await read(rig.requests, "a")) == FinishReason.CANCELLED


async def test_a_queued_request_out_of_time_ends_at_once(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a", deadline_s=rig.now_s() + 5)])
    await rig.pass_time(4.0)
    assert (await rig.requests.load()).num_waiting == 1
    await rig.pass_time(2.0)
    assert (await rig.requests.load()).num_waiting == 0
    assert reason(await read(rig.requests, "a")) == FinishReason.TIMEOUT


async def test_a_running_request_out_of_time_ends_at_the_next_commit(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", deadline_s=rig.now_s() + 5))
    await rig.worker.commit([Delta("a", 0, (1,))])
    await rig.pass_time(6.0)
    await rig.requests.cancel("a", "default")  # too late to be the reason
    assert await rig.worker.commit([Delta("a", 1, (2,))]) == {"a": Verdict.EXPIRED}
    log = await read(rig.requests, "a")
    assert (token_ids(log), reason(log)) == ([1], FinishReason.TIMEOUT)


# --- load ------------------------------------------------------------------------------------------------------------


async def test_load_and_queue_time(make_broker: MakeBroker) -> None:
    rig = await make_broker(max_waiting=1)
    await running(rig, ask("a"))
    await rig.requests.submit([ask("b")])
    await rig.pass_time(3.0)
    load = await rig.requests.load()
    assert (load.num_waiting, load.num_running, load.full) == (1, 1, True)
    assert load.oldest_wait_s == pytest.approx(3.0)
    await rig.worker.claim(1)
    await rig.worker.release(["b"])
    await rig.pass_time(3.0)
    await rig.worker.claim(1)
    await rig.worker.commit([Delta("b", 0, finish=STOP)])
    assert (await read(rig.requests, "b"))[-1].queue_s == pytest.approx(3.0)  # to the first claim


async def test_retry_after_follows_the_measured_throughput(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, *[ask(f"a{i}") for i in range(3)])
    for i in range(3):
        await rig.pass_time(4.0)
        await rig.worker.commit([Delta(f"a{i}", 0, finish=STOP)])
    told = []
    for i in range(20):
        await rig.requests.submit([ask(f"b{i}")])
        told.append((await rig.requests.load()).retry_after_s)
    assert told == [min(60, 4 * (i + 1)) for i in range(20)]
