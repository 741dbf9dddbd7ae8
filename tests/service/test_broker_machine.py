"""Both queues against a third, told in plain Python: whatever is done to them, in whatever order, they do as it does.

One machine, two stores. Redis gets the calls themselves, from two workers and two doors that are mere names, so that
lost replies, zombies, lost data and a full memory can be had at will; its whole content is compared after each step.
The in-process broker gets what it has rules for, and is compared by what it tells.

MACHINE_EXAMPLES=10000 makes a long run of it, with new examples; what fails is printed as a blob that reproduces it.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from tests.service.helpers_machine import Ask, Asked, Delta
from tests.service.helpers_moves import (
    DOORS,
    MAX_TOKENS,
    MAX_WAITING,
    PICK,
    PICKS,
    TIMES,
    WEIGHTS,
    WORKERS,
    QueueMachine,
    computed,
)
from tests.service.helpers_redis import LEASE_MS, Functions, entry, redis_server
from tests.service.helpers_stores import MemoryStore, RedisStore

NUM_EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "0"))  # 0: the few of every run, always the same


class MemoryMachine(QueueMachine):
    """One worker that never dies. Time passes by itself, so that everything is reaped when it comes due."""

    runner: ClassVar[asyncio.Runner]
    store: MemoryStore

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(self.runner, MAX_WAITING, MAX_TOKENS, WEIGHTS)

    def held(self, worker: str, picks: list[int]) -> list[tuple[str, str]]:
        """There are no tokens: it holds what it holds."""
        held = super().held(worker, picks)
        return [(id, r.token if (r := self.reference.asked.get(id)) else "") for id, _ in held]

    def take(self, worker: str, token: str, room: int) -> None:
        super().take("w1", token, room)

    def write(self, worker: str, number: int, step: list[Delta]) -> None:
        """Every commit ends what was cancelled or is out of time, in the step or not."""
        doomed = [r for r in self.reference.those("r") if r.doom and r.ask.id not in [id for id, *_ in step]]
        super().write("w1", number, step + [(r.ask.id, r.token, len(r.log), [], "") for r in doomed])

    def ask_for(self, group: list[Ask], key: tuple[str, str] | None) -> None:
        super().ask_for(group, key)
        self.time_passes(0)

    @rule(ms=TIMES)
    def time_passes(self, ms: int) -> None:
        """In small steps, for what comes due does so in its own moment."""
        self.reference.reap()
        for _ in range(ms // 250):
            self.reference.now += 250
            self.reference.reap()
        self.store.pass_ms(ms)

    def live(self, worker: str, ms: int) -> None:
        self.time_passes(ms)

    @precondition(lambda self: self.asks)
    @rule(pick=PICK)
    def follow_or_leave(self, pick: int) -> None:
        ask = self.pick(pick)
        r = self.reference.asked.get(ask.id)
        if r is None:
            return
        if ask.id in self.store.readers:
            self.store.leave(ask.id)
            ends = r.state != "e" and ask.orphan is not None
            r.orphan = self.reference.now + (ask.orphan or 0) if ends else None
        else:
            self.store.follow(ask.id, ask.tenant)
            r.orphan = None
        self.time_passes(0)

    def teardown(self) -> None:
        self.store.close()


class RedisMachine(QueueMachine):
    """All of the protocol, and all that can be lost. `seen` is the longest log that a door ever read of each."""

    functions: ClassVar[Functions]
    store: RedisStore

    def __init__(self) -> None:
        super().__init__()
        self.store = RedisStore(self.functions, MAX_WAITING, MAX_TOKENS)
        self.claims: dict[str, tuple[str, int]] = {}
        self.commits: dict[str, tuple[int, list[Delta]]] = {}
        self.seen: dict[str, list[int]] = {}
        self.lost: list[str] = []
        self.full = False

    # --- replies that were lost --------------------------------------------------------------------------------------

    def take(self, worker: str, token: str, room: int) -> None:
        self.claims[worker] = token, room
        super().take(worker, token, room)

    @rule(worker=WORKERS)
    def claim_again(self, worker: str) -> None:
        if worker in self.claims:
            self.take(worker, *self.claims[worker])

    def write(self, worker: str, number: int, step: list[Delta]) -> None:
        self.commits[worker] = number, step
        super().write(worker, number, step)

    @rule(worker=WORKERS)
    def commit_again(self, worker: str) -> None:
        if worker in self.commits:
            self.write(worker, *self.commits[worker])

    # --- workers that live, die and come back ------------------------------------------------------------------------

    @rule(worker=WORKERS, picks=PICKS)
    def beat(self, worker: str, picks: list[int]) -> None:
        held = self.held(worker, picks)
        assert self.store.beat(worker, held) == self.reference.beat(worker, held, LEASE_MS)

    @rule(worker=WORKERS, failed=st.booleans())
    def lose(self, worker: str, failed: bool) -> None:
        assert self.store.call("lose", worker, int(failed)) == self.reference.lose(worker, failed)

    @precondition(lambda self: self.num % 4 == 1)
    @rule(worker=WORKERS, num=st.integers(2, 4))
    def crash_in_a_loop(self, worker: str, num: int) -> None:
        for _ in range(num):
            self.claim(worker, 2)
            self.lose(worker, failed=True)

    @rule(worker=WORKERS, picks=PICKS)
    def abandon(self, worker: str, picks: list[int]) -> None:
        held = self.held(worker, picks)
        self.reference.abandon(held)
        self.store.abandon(held)

    @rule()
    def list_workers(self) -> None:
        alive = [name for name, end in self.reference.leases.items() if end > self.reference.now]
        announced = sorted(f"info of {name}".encode() for name in alive if name in self.reference.announced)
        assert sorted(self.store.call("workers")) == announced

    # --- time --------------------------------------------------------------------------------------------------------

    @rule(ms=TIMES)
    def time_passes(self, ms: int) -> None:
        self.reference.now += ms
        self.store.pass_ms(ms)

    def live(self, worker: str, ms: int) -> None:
        for left_ms in range(ms, 0, -2_000):
            self.time_passes(min(left_ms, 2_000))
            self.beat(worker, [0])
        self.reap()

    @rule()
    def reap(self) -> None:
        self.reference.reap()
        self.store.call("reap")

    @precondition(lambda self: self.num % 8 == 3)
    @rule()
    def everything_with_a_deadline_ends(self) -> None:
        """I10, whatever has died."""
        self.time_passes(30_000 + LEASE_MS)
        self.reap()
        assert all(r.deadline is None or r.state == "e" for r in self.reference.asked.values())

    # --- readers -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.asks)
    @rule(pick=PICK, door=DOORS, tenant=st.sampled_from([None, None, "x"]))
    def attach(self, pick: int, door: str, tenant: str | None) -> None:
        """I5: all that was ever read of a log is still its beginning."""
        ask = self.pick(pick)
        r = self.reference.touch(ask.id, door, tenant or ask.tenant)
        reply = self.store.call("attach", ask.id, tenant or ask.tenant, door)
        assert (reply[:2] == [f"payload of {ask.id}".encode(), b"q"]) == (r is not None)
        assert len(reply[2::2]) == (len(r.entries) if r else 0)
        if r:
            self.read(r)

    def read(self, r: Asked) -> None:
        """I5: what was ever read of a log is its beginning still, or the other way round after a loss."""
        known = self.seen.pop(r.ask.id, [])
        assert all(a == b for a, b in zip(known, r.log, strict=False))
        self.seen[r.ask.id] = max(known, r.log, key=len)

    @precondition(lambda self: self.asks)
    @rule(picks=PICKS, door=DOORS)
    def attend(self, picks: list[int], door: str) -> None:
        ids = [*(self.pick(pick).id for pick in picks), "unknown"]
        found = [self.reference.touch(id, door) for id in ids]
        expected = [part for r in found for part in ((len(r.log), r.state == "e") if r else (-1, 0))]
        assert self.store.call("attend", door, *ids) == expected

    # --- what Redis loses, and gets back -----------------------------------------------------------------------------

    @rule(pick=PICK, num=st.integers(0, 3), read=st.booleans())
    def lose_the_end_of_a_log(self, pick: int, num: int, read: bool) -> None:
        """As after a failover, which a reader may notice or not."""
        logs = [r for r in self.reference.asked.values() if r.state != "e" and r.log]
        if logs:
            r = logs[pick % len(logs)]
            if read:
                self.read(r)
            r.entries = r.entries[:num]
            self.store.functions.truncate(r.ask.id, num)

    @precondition(lambda self: self.seen)
    @rule(pick=PICK, differs=st.sampled_from([False, False, False, True]))
    def heal(self, pick: int, differs: bool) -> None:
        """I1: then the log is as long as what was ever read of it. It may also be that Redis had another one."""
        id = list(self.seen)[-1 - pick % len(self.seen)]
        copy = self.seen[id]
        if differs and copy:
            copy = computed(id, 0, len(copy), variant=self.fresh())
        expected = self.reference.heal(id, copy, copy != self.seen[id])
        assert self.store.call("heal", id, len(copy), entry(0, copy), int(copy != self.seen[id])) == expected
        if expected == 1:
            self.seen[id] = copy
            assert self.reference.asked[id].log == copy

    @precondition(lambda self: self.reference.asked)
    @rule(pick=PICK)
    def lose_a_group(self, pick: int) -> None:
        """As after a failover: it was submitted as one. Doors bring back its sequences one by one."""
        group = list(self.reference.asked.values())[pick % len(self.reference.asked)].ask.group
        for r in [r for r in self.reference.asked.values() if r.ask.group == group]:
            self.read(r)
            self.lost.append(r.ask.id)
            self.reference.lose_one(r.ask.id)
            self.store.functions.lose(r.ask.id)

    @precondition(lambda self: self.num % 8 == 5)
    @rule()
    def lose_everything(self) -> None:
        for r in self.reference.asked.values():
            self.read(r)
            self.lost.append(r.ask.id)
        self.reference.lose_all()
        self.store.functions.cli.flushall()
        self.store.functions.set_clock(self.reference.now)

    @precondition(lambda self: self.lost)
    @rule(pick=PICK, door=DOORS)
    def restore(self, pick: int, door: str) -> None:
        """What is there already, another door has brought back."""
        id = self.lost[-1 - pick % len(self.lost)]
        asked = self.asks[id], self.seen[id], door
        if self.full:
            self.refused(lambda: self.store.restore(*asked))
        else:
            assert self.store.restore(*asked) == self.reference.restore(*asked)

    # --- memory that runs out ----------------------------------------------------------------------------------------

    @rule()
    def fill(self) -> None:
        """Until something is refused, all the rest goes on."""
        self.full = True
        self.store.functions.server.fill()

    def refused(self, what: Callable[[], object]) -> None:
        """As a whole: the comparison after this step finds nothing of it."""
        with pytest.raises(redis.OutOfMemoryError):
            what()
        self.full = False
        self.store.functions.server.empty()

    def ask_for(self, group: list[Ask], key: tuple[str, str] | None) -> None:
        if self.full:
            self.refused(lambda: self.store.submit(group, key))
        else:
            super().ask_for(group, key)


def profile(share: float) -> settings:
    """`share` of the examples, each of 50 steps."""
    return settings(
        max_examples=int((NUM_EXAMPLES or 240) * share),
        stateful_step_count=50,
        derandomize=not NUM_EXAMPLES,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.timeout(600 + NUM_EXAMPLES)  # a failure is made smaller before it is told
def test_redis_does_as_the_reference(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        RedisMachine.functions = Functions(server)
        run_machine(RedisMachine, settings=profile(0.7))


@pytest.mark.timeout(600 + NUM_EXAMPLES)
def test_memory_does_as_the_reference() -> None:
    with asyncio.Runner() as MemoryMachine.runner:
        run_machine(MemoryMachine, settings=profile(0.3))
