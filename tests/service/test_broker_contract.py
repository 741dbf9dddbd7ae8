"""What every broker promises (`service/broker/base.py`), run on each of them: the ways of a request and of its log.

Nothing here knows which broker it has, how that cuts logs into entries, or when news arrives: what takes time is waited
for. How requests end, and when, is in `test_broker_contract_ends.py`.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from model.request import Delta, Finish, FinishReason, Grammar, Request, SamplingParams, TextOptions, TokenLogprob
from service.broker.base import CANCELLED, IdempotencyKey, Job, Verdict
from service.errors import IdempotencyConflict, Overloaded, RequestNotFound
from tests.service.helpers_broker import STOP, ask, ask_group, ending, logprobs, read, reading, reason, token_ids
from tests.service.helpers_rig import Limits, MakeBroker, claim, ids, running, submit

# --- submit ----------------------------------------------------------------------------------------------------------


async def test_a_request_reaches_the_worker_as_it_was_submitted(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    sampling = SamplingParams(0.5, 3, logit_bias=((7, -1.5),), seed=2**63 - 1, stop_token_ids=(1, 2), num_logprobs=2)
    far_s = rig.now_s() + 1000.25
    text = TextOptions(("ö",), echo=True)
    grammar = Grammar("regex", "[0-9]+")
    request = Request("a", (5, 6), sampling, text, grammar, "name", "me", 4, 1000.5, far_s, far_s, 1000.0)
    await rig.requests.submit([request])
    assert await claim(rig) == [Job(request)]


async def test_a_group_is_admitted_by_number_all_or_none(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(max_waiting=3))
    assert (await rig.requests.submit(ask_group("a", 2))).id == "a"
    with pytest.raises(Overloaded) as refused:
        await rig.requests.submit(ask_group("b", 2))
    assert (refused.value.num_waiting, refused.value.retry_after_s) == (2, 1)
    assert (await rig.requests.submit([ask("c")])).position == 2
    assert ids(await claim(rig)) == ["a.0", "a.1", "c"]


async def test_admission_counts_prompt_tokens_and_running_ones_no_more(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(max_waiting_tokens=10))
    await rig.requests.submit([ask("a", num_prompt=6)])
    with pytest.raises(Overloaded):
        await rig.requests.submit([ask("b", num_prompt=5)])
    await rig.requests.submit([ask("c", num_prompt=4)])
    assert (await rig.requests.load()).full
    await claim(rig, 1)
    await rig.requests.submit([ask("b", num_prompt=5)])


async def test_an_empty_queue_takes_a_group_that_would_never_fit(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(max_waiting=2, max_waiting_tokens=10))
    await rig.requests.submit(ask_group("a", 4, num_prompt=8))
    assert len(await claim(rig)) == 4


async def test_the_same_request_submitted_again_is_found_again(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    for asked in ([ask("a")], ask_group("b", 2)):
        assert (await rig.requests.submit(asked)).created
        again = await rig.requests.submit(asked)
        assert (again.id, again.created) == (asked[0].group, False)
    assert ids(await claim(rig)) == ["a", "b.0", "b.1"]


# --- idempotency keys ------------------------------------------------------------------------------------------------

KEY, OTHER_BODY = IdempotencyKey("k", "body"), IdempotencyKey("k", "other body")


async def test_a_key_finds_its_request_in_every_state(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    assert (await rig.requests.submit(ask_group("a", 2), KEY)).created
    for i in range(3):
        again = await rig.requests.submit([ask(f"never{i}")], KEY)
        assert (again.id, again.created) == ("a", False)
        if i == 0:
            assert ids(await claim(rig)) == ["a.0", "a.1"]
            await rig.worker.commit([Delta("a.0", 0, (1,), finish=STOP), Delta("a.1", 0, finish=STOP)])
    assert (await rig.requests.load()).num_waiting == 0


async def test_a_key_with_another_body_is_a_conflict(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a")], KEY)
    with pytest.raises(IdempotencyConflict):
        await rig.requests.submit([ask("b")], OTHER_BODY)
    assert (await rig.requests.submit([ask("c")], IdempotencyKey("another", "other body"))).created
    assert ids(await claim(rig)) == ["a", "c"]


async def test_a_known_key_is_found_in_a_full_queue_and_a_refused_one_is_not_kept(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(max_waiting=1))
    await rig.requests.submit([ask("a")], KEY)
    with pytest.raises(Overloaded):
        await rig.requests.submit([ask("b")], refused := IdempotencyKey("refused", "body"))
    with pytest.raises(IdempotencyConflict):
        await rig.requests.submit([ask("c")], OTHER_BODY)
    assert not (await rig.requests.submit([ask("d")], KEY)).created
    await claim(rig)
    assert (await rig.requests.submit([ask("b")], refused)).created


async def test_the_key_of_another_tenant_is_another_key(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a", tenant="me")], KEY)
    assert (await rig.requests.submit([ask("b", tenant="you")], OTHER_BODY)).created
    assert (await rig.requests.submit([ask("c", tenant="me")], KEY)).id == "a"
    assert (await rig.requests.submit([ask("d", tenant="you")], OTHER_BODY)).id == "b"


async def test_a_key_lives_as_long_as_its_request(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(keep_s=60.0))
    await rig.requests.submit([ask("a")], KEY)
    await rig.pass_time(100.0)
    await claim(rig)
    await rig.worker.commit([Delta("a", 0, finish=STOP)])
    await rig.pass_time(50.0)
    assert not (await rig.requests.submit([ask("b")], KEY)).created
    await rig.pass_time(20.0)
    assert (await rig.requests.submit([ask("b")], OTHER_BODY)).created


# --- lookup ----------------------------------------------------------------------------------------------------------


async def test_a_group_is_looked_up_by_the_id_that_the_client_knows(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    group, single = ask_group("a", 3, tenant="me"), ask("b", max_tokens=9)
    await rig.requests.submit(group)
    await rig.requests.submit([single])
    assert await rig.requests.lookup("a", "me") == tuple(group)
    assert await rig.requests.lookup("b", "default") == (single,)
    for id, tenant in [("a", "you"), ("b", "me"), ("unknown", "me")]:
        with pytest.raises(RequestNotFound):
            await rig.requests.lookup(id, tenant)


async def test_a_request_can_be_looked_up_until_its_log_expires(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(keep_s=60.0))
    group = ask_group("a", 2)
    await rig.requests.submit(group)
    await claim(rig)
    assert await rig.requests.lookup("a", "default") == tuple(group)
    await rig.worker.commit([Delta("a.0", 0, finish=STOP), Delta("a.1", 0, finish=STOP)])
    await rig.pass_time(50.0)
    assert await rig.requests.lookup("a", "default") == tuple(group)
    await rig.pass_time(20.0)
    with pytest.raises(RequestNotFound):
        await rig.requests.lookup("a", "default")


# --- who is next -----------------------------------------------------------------------------------------------------


async def test_claims_go_by_priority_then_arrival(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    for id, priority in [("a", 1), ("b", -1), ("c", 0), ("d", -2)]:
        await rig.requests.submit([ask(id, priority=priority)])
    assert (await rig.requests.submit([ask("e", priority=-1)])).position == 2
    assert (await rig.requests.submit([ask("f")])).position == 5
    assert ids(await claim(rig, 2)) == ["b", "d"]
    assert ids(await claim(rig)) == ["e", "a", "c", "f"]


async def test_who_has_waited_long_goes_before_priority(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, ask("old"), ask("old too"))
    await rig.pass_time(6.0)
    await submit(rig, ask("ahead", priority=-1))
    await rig.pass_time(6.0)
    await submit(rig, ask("new"), ask("ahead of new", priority=-1))
    assert ids(await claim(rig, 1)) == ["ahead"]
    assert ids(await claim(rig)) == ["old", "old too", "ahead of new", "new"]


async def test_a_flood_of_one_tenant_delays_another_by_one_request(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, *[ask(f"flood{i}", tenant="flood") for i in range(20)])
    await claim(rig, 3)
    assert (await rig.requests.submit([ask("a", tenant="me")])).position <= 1
    assert "a" in ids(await claim(rig, 2))
    await submit(rig, *[ask(f"b{i}", tenant="me") for i in range(3)])
    assert len({job.request.tenant for job in await claim(rig, 3)}) == 2


async def test_tenants_are_served_by_weight(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(weights={"heavy": 3.0}))
    for tenant in ("light", "heavy"):
        await submit(rig, *[ask(f"{tenant}{i}", tenant=tenant) for i in range(20)])
    tenants = [job.request.tenant for _ in range(16) for job in await claim(rig, 1)]
    assert [tenants[i : i + 8].count("heavy") for i in (0, 8)] == [6, 6]


async def test_large_requests_of_a_tenant_weigh_more_than_small_ones(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, *[ask(f"large{i}", 20, 20, tenant="large") for i in range(6)])
    await submit(rig, *[ask(f"small{i}", 4, 6, tenant="small") for i in range(20)])
    tenants = [job.request.tenant for job in await claim(rig, 20)]
    assert [tenants[i : i + 5].count("small") for i in (0, 5, 10, 15)] == [4, 4, 4, 4]


# --- claim, release, abandon -----------------------------------------------------------------------------------------


async def test_a_claim_waits_for_a_request(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    waiting = asyncio.create_task(claim(rig, 1))
    await rig.pass_time(1.0)
    assert not waiting.done()
    await submit(rig, ask("a"))
    assert ids(await waiting) == ["a"]


async def test_a_claim_that_is_cancelled_has_taken_nothing(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    cancelled = asyncio.create_task(claim(rig, 1))
    await rig.pass_time(1.0)
    cancelled.cancel()
    await submit(rig, ask("a"))
    assert isinstance((await asyncio.gather(cancelled, return_exceptions=True))[0], asyncio.CancelledError)
    assert ids(await claim(rig, 1)) == ["a"]


async def test_a_released_request_keeps_its_ids_and_its_place(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (10, 11))])
    await rig.requests.submit([ask("b")])
    await rig.worker.release(["a", "unknown"])
    assert await claim(rig) == [Job(ask("a"), (10, 11)), Job(ask("b"))]
    await rig.worker.commit([Delta("a", 2, (12,), finish=STOP)])
    assert token_ids(await read(rig.requests, "a")) == [10, 11, 12]


async def test_what_a_failed_engine_abandons_is_tried_again_or_ends_as_an_error(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    await rig.worker.commit([Delta("a", 0, (10, 11))])
    await rig.worker.abandon(["a", "unknown"])
    assert await rig.worker.commit([Delta("a", 2, (99,)), Delta("b", 0, (20,))]) == {"a": Verdict.FENCED}
    if rig.retries:
        assert await claim(rig) == [Job(ask("a"), (10, 11))]
        await rig.worker.commit([Delta("a", 2, finish=STOP)])
        assert reason(await read(rig.requests, "a")) == FinishReason.STOP
    else:
        end = ending(await read(rig.requests, "a"))
        assert (end.reason, bool(end.error)) == (FinishReason.ERROR, True)
    assert token_ids(await read(rig.requests, "a")) == [10, 11]
    load = await rig.requests.load()
    assert (load.num_waiting, load.num_running) == (0, 1)


async def test_what_is_abandoned_or_released_after_its_cancellation_ends_as_cancelled(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    for id in ("a", "b"):
        await rig.requests.cancel(id, "default")
    await rig.worker.abandon(["a"])
    await rig.worker.release(["b"])
    assert await rig.worker.commit([]) == {}
    assert [ending(await read(rig.requests, id)) for id in ("a", "b")] == [CANCELLED, CANCELLED]


# --- commit ----------------------------------------------------------------------------------------------------------


async def test_a_log_says_what_was_committed(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    chances = [TokenLogprob(-0.5, ((1, -0.5), (2, -1.25))), TokenLogprob(-0.25)]
    finish = Finish(FinishReason.STOP, stop_reason="end")
    assert await rig.worker.commit([Delta("a", 0, (1,), (chances[0],))]) == {}
    assert await rig.worker.commit([Delta("a", 1, (2,), (chances[1],), finish)]) == {}
    log = await read(rig.requests, "a")
    assert (token_ids(log), logprobs(log), ending(log)) == ([1, 2], chances, finish)


async def test_a_result_reaches_every_reader_in_the_terminal_entry(make_broker: MakeBroker) -> None:
    rig, result = await make_broker(), bytes(range(256)) * 16
    await rig.requests.submit([replace(ask("a", num_prompt=5), task="embed", pooling="mean")])
    [job] = await claim(rig)
    assert (job.request.task, job.request.pooling) == ("embed", "mean")
    early = asyncio.create_task(read(rig.requests, "a"))
    await rig.worker.commit([Delta("a", 0, finish=STOP, result=result)])
    for entries in (await early, await read(rig.requests, "a")):
        assert [entry.result for entry in entries] == [result] and entries[0].finish == STOP
    assert (await rig.requests.peek("a", "default")).log.result == result


@pytest.mark.parametrize("start", [0, 2])
async def test_ids_that_do_not_continue_the_log_are_not_written(make_broker: MakeBroker, start: int) -> None:
    rig = await make_broker()
    await running(rig, ask("a"), ask("b"))
    await rig.worker.commit([Delta("a", 0, (1,))])
    assert await rig.worker.commit([Delta("a", start, (7,)), Delta("b", 0, (2,))]) == {"a": Verdict.FENCED}
    assert await claim(rig, 1) == [Job(ask("a"), (1,))]


async def test_who_does_not_hold_a_request_is_fenced(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("ended"), ask("released"))
    await rig.worker.commit([Delta("ended", 0, finish=STOP)])
    await rig.worker.release(["released"])
    await rig.requests.submit([ask("waiting")])
    step = [Delta(id, 0, (1,)) for id in ("ended", "released", "waiting", "unknown")]
    assert await rig.worker.commit(step) == {delta.id: Verdict.FENCED for delta in step}
    assert token_ids(await read(rig.requests, "ended")) == []
    assert await claim(rig) == [Job(ask("released")), Job(ask("waiting"))]


# --- follow ----------------------------------------------------------------------------------------------------------


async def test_several_readers_follow_live_from_any_position(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit([ask("a")])
    async with AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(reading(rig.requests, "a", after)) for after in (0, 2, 9)]
        await claim(rig, 1)
        await rig.worker.commit([Delta("a", 0, (10, 11, 12))])
        assert await readers[0].got(3) == [10, 11, 12]
        readers.append(await stack.enter_async_context(reading(rig.requests, "a", 1)))
        await rig.worker.commit([Delta("a", 3, (13,))])
        assert await readers[3].got(3) == [11, 12, 13]
        await rig.worker.commit([Delta("a", 4, (14,), finish=STOP)])
        logs = [await reader.log() for reader in readers]
    logs += [await read(rig.requests, "a", after) for after in (3, 5)]
    assert [token_ids(log) for log in logs] == [[10, 11, 12, 13, 14][n:] for n in (0, 2, 9, 1, 3, 5)]
    assert {reason(log) for log in logs} == {FinishReason.STOP}
    assert [log[0].start for log in logs[:2]] == [0, 2]
    assert all(entry.token_ids or entry.finish for log in logs for entry in log)


async def test_log_probabilities_are_cut_with_their_ids(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    await rig.worker.commit([Delta("a", 0, (1, 2), (TokenLogprob(-1.0), TokenLogprob(-2.0)), STOP)])
    log = await read(rig.requests, "a", 1)
    assert (log[0].start, token_ids(log), logprobs(log)) == (1, [2], [TokenLogprob(-2.0)])


async def test_a_reader_that_leaves_changes_nothing_for_the_others(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    async with reading(rig.requests, "a") as one, reading(rig.requests, "a") as other:
        await rig.worker.commit([Delta("a", 0, (1,))])
        assert [await reader.got(1) for reader in (one, other)] == [[1], [1]]
        await one.leave()
        assert await rig.worker.commit([Delta("a", 1, (2,), finish=STOP)]) == {}
        assert token_ids(await other.log()) == [1, 2]
    assert reason(await read(rig.requests, "a")) == FinishReason.STOP


async def test_the_log_is_kept_for_a_while_after_the_end(make_broker: MakeBroker) -> None:
    rig = await make_broker(Limits(keep_s=60.0))
    await running(rig, ask("a", deadline_s=rig.now_s() + 40))
    await rig.pass_time(20.0)
    await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)])
    await rig.pass_time(50.0)
    assert token_ids(await read(rig.requests, "a")) == [1]
    await rig.pass_time(20.0)
    with pytest.raises(RequestNotFound):
        await read(rig.requests, "a")


async def test_another_tenants_request_does_not_exist(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", tenant="me"))
    async with reading(rig.requests, "a", tenant="me") as reader:
        with pytest.raises(RequestNotFound):
            await read(rig.requests, "a", tenant="you")
        await rig.requests.cancel("a", "you")
        assert await rig.worker.commit([Delta("a", 0, (1,), finish=STOP)]) == {}
        assert reason(await reader.log()) == FinishReason.STOP
