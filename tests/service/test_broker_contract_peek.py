"""What every broker promises of a look at a request, run on each of them: how it stands now, without waiting for it."""

import pytest

from model.request import Delta, TokenLogprob
from service.broker.base import CANCELLED, Glance
from service.errors import RequestNotFound
from tests.service.helpers_broker import STOP, ask, ask_group, read, reason
from tests.service.helpers_rig import MakeBroker, Rig, claim, running, submit


async def glance(rig: Rig, id: str, tenant: str = "default") -> Glance:
    return await rig.requests.peek(id, tenant)


async def test_what_waits_knows_its_place(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await rig.requests.submit(ask_group("a", 2))
    await submit(rig, ask("b"), ask("first", priority=-1))
    places = [(await glance(rig, id)).position for id in ("first", "a.0", "a.1", "b")]
    assert places == [0, 1, 2, 3]
    await claim(rig, 2)
    assert [(await glance(rig, id)).position for id in ("first", "a.0", "a.1", "b")] == [None, None, 0, 1]


async def test_a_look_tells_the_log_so_far_and_its_end(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    assert (await glance(rig, "a")).log.token_ids == ()
    logprobs = (TokenLogprob(-0.5, ((7, -0.5),)), TokenLogprob(-1.0))
    await rig.worker.commit([Delta("a", 0, (5, 6), logprobs)])
    seen = await glance(rig, "a")
    assert (seen.log.token_ids, seen.log.logprobs, seen.log.finish) == ((5, 6), logprobs, None)
    await rig.worker.commit([Delta("a", 2, (7,), finish=STOP)])
    [whole] = [entry for entry in await read(rig.requests, "a") if entry.finish]
    ended = await glance(rig, "a")
    assert (ended.log.token_ids, ended.log.finish, ended.log.timings) == ((5, 6, 7), STOP, whole.timings)
    assert (ended.position, ended.num_computed) == (None, 0)


async def test_what_was_found_in_the_cache_is_told_to_every_reader_by_the_end(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", num_prompt=100))
    await rig.worker.commit([Delta("a", 0, (5,))])
    assert (await glance(rig, "a")).log.num_cached == 0
    await rig.worker.commit([Delta("a", 1, (6,), finish=STOP, num_cached=32)])
    for _ in range(2):
        assert (await read(rig.requests, "a"))[-1].num_cached == 32
    assert (await glance(rig, "a")).log.num_cached == 32


async def test_how_far_a_prompt_has_come_is_told_while_it_runs(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a", num_prompt=100))
    for num_computed in (32, 64):
        assert not await rig.worker.commit([Delta("a", 0, num_computed=num_computed)])
        await rig.pass_time(1.0)
        assert (await glance(rig, "a")).num_computed == num_computed
    await rig.worker.release(["a"])
    assert (await glance(rig, "a")).num_computed == 0
    await claim(rig)  # whoever has it now begins anew
    assert (await glance(rig, "a")).num_computed == 0


async def test_telling_of_a_prompt_changes_no_log(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await running(rig, ask("a"))
    assert not await rig.worker.commit([Delta("a", 0, num_computed=2)])
    assert not await rig.worker.commit([Delta("a", 0, (1,)), Delta("a", 1, num_computed=3)])
    await rig.worker.commit([Delta("a", 1, (2,), finish=STOP)])
    assert [entry.token_ids for entry in await read(rig.requests, "a")][-1][-1:] == (2,)


async def test_to_look_is_not_to_read(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, ask("a", orphan_s=10.0))
    for _ in range(3):
        await glance(rig, "a")
        await rig.pass_time(4.0)
    assert (await glance(rig, "a")).log.finish == CANCELLED
    assert reason(await read(rig.requests, "a")) == CANCELLED.reason


async def test_what_is_not_there_or_anothers_can_not_be_looked_at(make_broker: MakeBroker) -> None:
    rig = await make_broker()
    await submit(rig, ask("a", tenant="me"))
    for id, tenant in (("a", "you"), ("b", "me"), ("a.0", "me")):
        with pytest.raises(RequestNotFound):
            await glance(rig, id, tenant)
    assert (await glance(rig, "a", "me")).position == 0
