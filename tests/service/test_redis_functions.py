"""The functions of the queue by themselves: what is asked twice or too late, what is kept and for how long, what a full
memory refuses, and functions that are missing, older, or of another version.

The state machine covers their order and the contract suite their sense; here is what neither of them reaches.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from service.broker.redis import PREFIX, PROTOCOL, Link, source
from service.errors import Unavailable
from tests.service.helpers_broker import HANG_S
from tests.service.helpers_redis import LEASE_MS, Functions, entry, redis_server

KEEP_MS, SLACK_MS, WEEK_MS = 20_000, 600_000, 8 * 86_400_000
LARGE = bytes(100_000)  # so that what stays shows
FLOW = ("q", "x", "b", 1.0, KEEP_MS, "door")  # of `restore`


@pytest.fixture(scope="module")
def of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Functions]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield Functions(server)


@pytest.fixture
def functions(of_this_module: Functions) -> Functions:
    of_this_module.reset()
    return of_this_module


# --- what is lost and brought back -----------------------------------------------------------------------------------


def restore(functions: Functions, id: str, queue_left_ms: int, ids: list[int]) -> None:
    asked = (id, b"payload", 3, 7, "", queue_left_ms, "", 1)
    assert functions.call("restore", *FLOW, *asked, len(ids), entry(0, ids)) == 1


def test_what_had_begun_is_not_out_of_queue_time_when_it_is_restored(functions: Functions) -> None:
    restore(functions, "begun", 0, [1, 2])
    restore(functions, "waiting", 0, [])
    functions.call("reap")
    assert functions.end("waiting") == ["timeout", "queue_timeout_s", False]
    assert functions.claim("w", "token") == ["begun"]


def test_what_was_cancelled_while_it_ran_ends_when_its_log_is_healed(functions: Functions) -> None:
    functions.submit("a")
    functions.claim("w", "token")
    functions.call("cancel", "a", "x")
    functions.call("heal", "a", 2, entry(0, [1, 2]), "0")
    assert functions.log("a") == [1, 2]
    assert functions.end("a") == ["cancelled", False, False]


# --- asked again, and too late ---------------------------------------------------------------------------------------


def test_a_claim_asked_again_brings_what_of_it_is_still_held(functions: Functions) -> None:
    functions.submit("a", "b", "c")
    assert functions.claim("w", "token", room=2) == ["a", "b"]
    functions.commit("w", 1, ("a", "token", 0, [1], "stop"))
    assert functions.claim("w", "token", room=2) == ["b"]
    assert functions.field("b", "at") == "1"


def test_a_final_commit_asked_again_by_another_number_writes_nothing(functions: Functions) -> None:
    """As by a worker that was forgotten meanwhile."""
    functions.submit("a")
    functions.claim("w", "token")
    final = ("a", "token", 0, [1, 2], "stop")
    assert functions.commit("w", 1, final) == [1]
    functions.call("lose", "w")
    assert functions.commit("w", 1, final) == functions.commit("w", 2, final) == [-1]
    assert functions.log("a") == [1, 2]


def test_a_zombie_can_neither_write_nor_return_nor_keep_what_it_lost(functions: Functions) -> None:
    functions.submit("a")
    functions.claim("zombie", "old")
    functions.pass_ms(LEASE_MS)
    functions.call("reap")
    assert functions.claim("w", "new") == ["a"]
    assert functions.commit("zombie", 1, ("a", "old", 0, [9], "")) == [-1]
    assert functions.call("beat", "zombie", LEASE_MS, b"info", "a", "old") == [-1]
    functions.call("release", "a", "old")
    functions.call("abandon", "a", "old")
    assert (functions.field("a", "st"), functions.field("a", "lk")) == ("r", "new")
    assert functions.commit("w", 1, ("a", "new", 0, [1], "")) == [1]


# --- for how long ----------------------------------------------------------------------------------------------------


def ask_with_key(functions: Functions, id: str) -> Any:
    asked = (id, LARGE, 3, 7, 5_000, "", 3_000, 1)
    return functions.call("submit", "q", 100, 10_000, "x", "b", 1.0, KEEP_MS, "key", "body", id, *asked)


def test_every_key_expires_as_the_table_of_keys_says(functions: Functions) -> None:
    """Though Redis's clock may step: long after the protocol has no more use for it."""
    ask_with_key(functions, "a")
    functions.submit("b")
    functions.claim("w", "token", room=1)
    functions.call("beat", "w", LEASE_MS, b"info", "a", "token")
    functions.commit("w", 1, ("a", "token", 0, [1], ""))
    picture = functions.picture()
    assert not picture.kept_for_ever()
    expiring = {name: round(ms, -5) for name, ms in picture.ttl_ms.items() if ms >= 0}
    assert expiring.keys() == {"r:a", "r:b", "o:a", "idem:x:key", "q:q", "t:x", "held:w", "w:w"}
    assert set(expiring.values()) == {WEEK_MS}
    functions.commit("w", 2, ("a", "token", 1, [2], "stop"))
    left_ms = functions.picture().ttl_ms
    assert {round(left_ms[name], -4) for name in ("r:a", "o:a", "idem:x:key")} == {KEEP_MS + SLACK_MS}


def test_a_worker_that_only_claimed_does_not_stay_for_ever(functions: Functions) -> None:
    functions.submit("a")
    functions.claim("w", "token")
    assert not functions.picture().kept_for_ever()


def live_through(functions: Functions, run: int) -> None:
    """20 requests with all kinds of ends, one of them large, until they are forgotten; a worker comes and goes."""
    ids, worker, token = [f"{run}-{i}" for i in range(20)], f"worker{run}", f"token{run}"
    ask_with_key(functions, ids[0])
    functions.submit(*ids[1:15], orphan="3000")
    functions.submit(*ids[15:], queue=f"q{run % 2}", left_ms=2_000)
    assert len(functions.claim(worker, token, room=10)) == 10
    functions.call("attach", ids[1], "x", f"door{run}", 0)
    functions.commit(worker, 1, *[(id, token, 0, list(range(50)), "stop" if i < 5 else "") for i, id in enumerate(ids)])
    functions.call("cancel", ids[14], "x")
    functions.call("lose", worker, "1")
    for _ in range(2):
        functions.pass_ms(KEEP_MS)
        functions.call("reap")


def test_many_requests_leave_no_more_behind_than_a_few(functions: Functions) -> None:
    def left() -> tuple[set[str], int]:
        functions.cli.execute_command("MEMORY", "PURGE")  # type: ignore[no-untyped-call]
        return set(functions.picture().ttl_ms), functions.cli.info("memory")["used_memory_dataset"]

    for run in range(4):
        live_through(functions, run)
    before, before_bytes = left()
    assert before == {"clock", "q:q", "q:q0", "q:q1", "t:x"}
    for run in range(4, 40):
        live_through(functions, run)
    after, after_bytes = left()
    assert after == before
    assert after_bytes - before_bytes < 5 * len(LARGE)  # of 36; a connection's buffers come and go


def test_what_was_given_up_is_remembered_up_to_a_number(functions: Functions) -> None:
    for _ in range(1500):
        functions.cli.xadd(PREFIX + "dead", {"id": "x"})
    functions.submit("a")
    for i in range(4):
        functions.call("abandon", *[part for id in functions.claim("w", f"t{i}") for part in (id, f"t{i}")])
    assert functions.end("a") is not None
    assert 1000 <= functions.cli.xlen(PREFIX + "dead") <= 1100


# --- no memory -------------------------------------------------------------------------------------------------------


async def test_a_full_memory_is_told_as_that(functions: Functions) -> None:
    async with link(functions) as calls:
        functions.server.fill()
        with pytest.raises(Unavailable, match="memory is full") as refused:
            await calls.call("restore", *FLOW, "a", b"payload", 3, 7, "", "", "", 1, 0, b"", within_s=HANG_S)
        assert refused.value.retry_after_s == 10
        assert await calls.call("lookup", "a", "x", within_s=HANG_S) == []
        assert calls.away_s() == 0


def test_only_what_brings_something_new_is_refused_without_memory(functions: Functions) -> None:
    assert set(re.findall(r"register\('(\w+)', \w+\)", source())) == {"submit", "restore"}


# --- functions that are not there, or others -------------------------------------------------------------------------


@asynccontextmanager
async def link(functions: Functions, may_load: bool = False) -> AsyncIterator[Link]:
    opened = Link(functions.server.url, may_load=may_load)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


async def test_who_may_brings_the_functions_back_in_the_middle_of_everything(functions: Functions) -> None:
    async with link(functions, may_load=True) as calls:
        functions.cli.function_flush()
        assert await calls.call("lookup", "a", "x", within_s=HANG_S) == []


async def test_who_may_not_waits_until_they_are_there(functions: Functions) -> None:
    functions.cli.function_flush()
    async with link(functions) as calls:
        with pytest.raises(Unavailable, match="can't be reached"):
            await calls.call("reap", within_s=0.1)
        waiting = asyncio.create_task(calls.call("lookup", "a", "x", within_s=HANG_S))
        await asyncio.sleep(0)
        functions.cli.function_load(source())
        assert await waiting == []
        assert calls.away_s() == 0


def test_other_code_of_the_same_version_goes_on_with_what_is_there(functions: Functions) -> None:
    """Workers of several releases load theirs one after the other, while requests run."""
    functions.submit("a")
    functions.claim("w", "token")
    functions.cli.function_load(source().replace("local SCAN = 200", "local SCAN = 100"), replace=True)
    assert functions.commit("w", 1, ("a", "token", 0, [1], "")) == [1]
    functions.cli.function_load(source(), replace=True)
    assert functions.commit("w", 2, ("a", "token", 1, [2], "stop")) == [1]


def test_another_version_of_the_protocol_stands_beside_ours(functions: Functions) -> None:
    own, other = f"millrace{PROTOCOL}", f"millrace{PROTOCOL + 1}"
    functions.cli.function_load(source().replace(own, other))
    functions.submit("a")
    assert functions.claim("w", "token") == ["a"]
    functions.cli.function_delete(own)
    with pytest.raises(redis.ResponseError, match="Function not found"):
        functions.call("reap")
