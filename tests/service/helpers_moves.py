"""The moves of the state machine that both queues have, made on a store and on the reference alike.

What is drawn is small and repeats itself: few tenants, workers and limits, so that they meet.
"""

from typing import TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.service.helpers_machine import KEEP, Ask, Asked, Delta, Reference
from tests.service.helpers_redis import LEASE_MS, START_MS
from tests.service.helpers_stores import Store

MAX_WAITING, MAX_TOKENS = 12, 200
WEIGHTS = {"x": 1.0, "y": 3.0, "z": 0.7}
PICK = st.integers(0, 99)
LIMITS = st.sampled_from([None, None, None, None, None, None, 0, 1_000, 5_000, 30_000])
TIMES = st.sampled_from([250, 250, 250, 500, 1_000, LEASE_MS - 250, LEASE_MS, 10_000, KEEP])
WORKERS, DOORS = st.sampled_from(["w1", "w2"]), st.sampled_from(["d1", "d2"])
KEYS = st.none() | st.none() | st.tuples(st.sampled_from(["k1", "k2"]), st.sampled_from(["body", "other"]))
Limit: TypeAlias = int | None
Key: TypeAlias = tuple[str, str] | None
Wish: TypeAlias = tuple[str, bool, int, tuple[int, int], tuple[Limit, Limit, Limit], Key]
WISHES: st.SearchStrategy[Wish] = st.tuples(
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from([False, False, True]),
    st.sampled_from([1, 1, 1, 2, 3]),
    st.tuples(st.integers(1, 40), st.integers(1, 20)),
    st.tuples(LIMITS, LIMITS, LIMITS),
    KEYS,
)
PICKS = st.lists(PICK, min_size=1, max_size=3)
PARTS = st.tuples(PICK, st.sampled_from([0, 1, 1, 2, 17]), st.sampled_from(["", "", "", "stop", "gap"]))


def computed(id: str, start: int, num: int, variant: int = 0) -> list[int]:
    """The ids of a request are a function of it, as those of a model are."""
    return [(sum(map(ord, id)) * 31 + i * 7 + variant) % 1000 for i in range(start, start + num)]


class QueueMachine(RuleBasedStateMachine):
    """What both stores can do. `grants` is what every claim ever gave, also what was taken away since."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference(START_MS, MAX_WAITING, MAX_TOKENS)
        self.asks: dict[str, Ask] = {}
        self.grants: list[tuple[str, str, str]] = []  # worker, id, token
        self.last: tuple[list[Ask], tuple[str, str] | None] | None = None  # submitted
        self.num = 0

    def fresh(self) -> int:
        """Numbers that are used once."""
        self.num += 1
        return self.num

    def pick(self, number: int) -> Ask:
        return list(self.asks.values())[-1 - number % min(16, len(self.asks))]

    def held(self, worker: str, picks: list[int]) -> list[tuple[str, str]]:
        """Some of what this worker was given, none twice: most of it what it still holds."""
        own = [(id, token) for name, id, token in self.grants if name == worker]
        own = own[-2:] + [(r.ask.id, r.token) for r in self.reference.those("r") if r.worker == worker]
        return list({own[-1 - pick % len(own)][0]: own[-1 - pick % len(own)] for pick in picks}.values()) if own else []

    # --- the door ----------------------------------------------------------------------------------------------------

    @initialize(wishes=st.lists(WISHES, min_size=2, max_size=4))
    def begin(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            self.submit(wish)

    @rule(wish=WISHES)
    def submit(self, wish: Wish) -> None:
        tenant, ahead, num, cost, limits, key = wish
        name = f"r{self.fresh():03}"
        ids = [name] if num == 1 else [f"{name}.{i}" for i in range(num)]
        group = [Ask(id, num, tenant, ahead, WEIGHTS[tenant], *cost, *limits) for id in ids]
        self.last = group, key
        self.ask_for(group, key)

    @precondition(lambda self: self.last)
    @rule()
    def submit_again(self) -> None:
        assert self.last
        group, key = self.last
        if len({ask.id in self.reference.asked for ask in group}) == 1:  # it is there whole or not at all
            self.ask_for(group, key)

    def ask_for(self, group: list[Ask], key: tuple[str, str] | None) -> None:
        expected = self.reference.submit(group, key)
        told = self.store.submit(group, key)
        if expected[0] == "full":  # one reckons in seconds, and may round the mean of intervals differently
            assert told[:2] == expected[:2] and abs(int(str(told[2])) - int(str(expected[2]))) <= 1
        else:
            assert told == expected
        if expected[0] == "ok":
            self.asks |= {ask.id: ask for ask in group}

    @precondition(lambda self: self.asks)
    @rule(pick=PICK, tenant=st.sampled_from([None, None, "x"]), running=st.booleans())
    def cancel(self, pick: int, tenant: str | None, running: bool) -> None:
        those = self.reference.those("r") if running else []
        ask = those[pick % len(those)].ask if those else self.pick(pick)
        self.reference.cancel(ask.id, tenant or ask.tenant)
        self.store.cancel(ask.id, tenant or ask.tenant)

    @precondition(lambda self: self.asks)
    @rule(pick=PICK, tenant=st.sampled_from([None, "x"]))
    def lookup(self, pick: int, tenant: str | None) -> None:
        ask = self.pick(pick)
        asked = ask.group, tenant or ask.tenant
        assert self.store.lookup(*asked) == self.reference.lookup(*asked)

    # --- the worker --------------------------------------------------------------------------------------------------

    @rule(worker=WORKERS, room=st.integers(1, 3))
    def claim(self, worker: str, room: int) -> None:
        self.take(worker, f"token{self.fresh()}", room)

    def take(self, worker: str, token: str, room: int) -> None:
        expected = self.reference.claim(worker, token, room, self.store.lease_ms)
        told = self.store.claim(worker, token, room)
        assert told == [(id, self.reference.asked[id].log) for id in expected]
        self.grants += [(worker, id, token) for id in expected if (worker, id, token) not in self.grants]

    @rule(worker=WORKERS, parts=st.lists(PARTS, min_size=1, max_size=3))
    def commit(self, worker: str, parts: list[tuple[int, int, str]]) -> None:
        held = self.held(worker, [pick for pick, _, _ in parts])
        self.write(worker, self.fresh(), [self.delta(*h, *part[1:]) for h, part in zip(held, parts, strict=False)])

    def delta(self, id: str, token: str, num: int, how: str) -> Delta:
        r = self.reference.asked.get(id)
        start = (len(r.log) if r else 0) + (how == "gap")
        return id, token, start, computed(id, start, num), how if how == "stop" else ""

    def write(self, worker: str, number: int, step: list[Delta]) -> None:
        expected = self.reference.commit(worker, number, step, self.store.lease_ms)
        assert self.store.commit(worker, number, step) == expected

    @rule(worker=WORKERS, num=st.integers(1, 3), wish=WISHES)
    def work(self, worker: str, num: int, wish: Wish) -> None:
        """As an engine does, in the long run: there is something to do, and everything it holds goes on."""
        if len(self.reference.those("w")) < num:
            self.submit(wish)
        self.claim(worker, num)
        for _ in range(num):
            held = self.held(worker, list(range(8)))
            self.write(worker, self.fresh(), [self.delta(*h, 1, "") for h in held])

    @precondition(lambda self: self.with_a_deadline())
    @rule(pick=PICK)
    def run_out_of_time(self, pick: int) -> None:
        """Of one that runs the deadline passes, while its worker lives."""
        those = self.with_a_deadline()
        r = those[pick % len(those)]
        self.live(r.worker, max(0, (r.deadline or 0) - self.reference.now))

    def with_a_deadline(self) -> list[Asked]:
        return [r for r in self.reference.those("r") if r.deadline is not None and not r.doom]

    def live(self, worker: str, ms: int) -> None:
        """Time passes for everybody, and this worker does not die of it."""
        raise NotImplementedError

    @rule(worker=WORKERS, picks=PICKS)
    def release(self, worker: str, picks: list[int]) -> None:
        held = self.held(worker, picks)
        self.reference.release(held)
        self.store.release(held)

    @invariant()
    def the_store_is_as_the_reference(self) -> None:
        self.store.check(self.reference)
