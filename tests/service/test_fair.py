"""Fair queueing: shares as weighted, nobody starves or waits for a flood, places are kept, nothing is remembered."""

import random
from itertools import count
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from model.request import Request, SamplingParams
from service.broker.base import AGEING_S
from service.broker.fair import FairQueue, Ticket, cost

TENANTS = ("a", "b", "c", "d")
COSTS = st.integers(1, 1000)
WEIGHTS = st.fixed_dictionaries({tenant: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for tenant in TENANTS})
BACKLOGS = st.fixed_dictionaries({tenant: st.lists(COSTS, max_size=12) for tenant in TENANTS})
LONG_BACKLOGS = st.fixed_dictionaries({tenant: st.lists(COSTS, min_size=20, max_size=20) for tenant in TENANTS})
PRIORITIES = st.sampled_from([-1, 0, 1])


def filled(weights: dict[str, float], backlogs: dict[str, list[int]]) -> FairQueue:
    """Everything submitted at 0; ids are `<tenant><i>`."""
    queue = FairQueue(weights)
    for tenant, costs in backlogs.items():
        for i, amount in enumerate(costs):
            queue.add(f"{tenant}{i}", tenant, amount, submitted_s=0.0)
    return queue


def taken(queue: FairQueue, num: int | None = None) -> list[str]:
    return [queue.take().id for _ in range(len(queue) if num is None else min(num, len(queue)))]


# --- between tenants -------------------------------------------------------------------------------------------------


def test_what_is_charged_is_the_most_that_a_request_can_take() -> None:
    assert cost(Request("a", (1, 2, 3), SamplingParams(max_tokens=40))) == 43


def test_of_one_tenant_the_first_to_arrive_is_the_first_to_go() -> None:
    queue = FairQueue()
    for i, amount in enumerate([500, 1, 30]):
        queue.add(str(i), "a", amount, submitted_s=9.0 - i)
    assert taken(queue) == ["0", "1", "2"]


@given(WEIGHTS, LONG_BACKLOGS)
def test_tenants_that_all_wait_are_served_as_weighted(
    weights: dict[str, float], backlogs: dict[str, list[int]]
) -> None:
    """The paper's first theorem: by weight, the service of any two differs by one request of each at most."""
    queue = filled(weights, backlogs)
    largest = {tenant: max(costs) / weights[tenant] for tenant, costs in backlogs.items()}
    served = dict.fromkeys(TENANTS, 0.0)
    while all(backlogs.values()):
        tenant = queue.take().id[0]
        served[tenant] += backlogs[tenant].pop(0) / weights[tenant]
        assert all(abs(served[x] - served[y]) <= largest[x] + largest[y] + 1e-6 for x in TENANTS for y in TENANTS)


@given(WEIGHTS, BACKLOGS, st.integers(0, 30), COSTS)
def test_a_flood_delays_another_by_at_most_one_request_of_each_who_waits(
    weights: dict[str, float], backlogs: dict[str, list[int]], num_taken: int, amount: int
) -> None:
    queue = filled(weights, backlogs)
    taken(queue, num_taken)
    ticket = queue.add("new", "new", amount, submitted_s=1.0)
    position, order = queue.position(ticket), taken(queue)
    assert position == order.index("new")
    waited_for = [id[0] for id in order[:position]]
    assert len(set(waited_for)) == len(waited_for)


@given(WEIGHTS, st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_nobody_starves_whatever_the_others_submit(weights: dict[str, float], costs: list[int]) -> None:
    """The others keep as many small requests waiting as they like; the bound is on their tags below ours."""
    queue, others = FairQueue(weights), TENANTS[1:]
    mine = [queue.add(f"mine{i}", "a", amount, 0.0) for i, amount in enumerate(costs)]
    bound = len(mine) + sum(weights[tenant] * mine[-1].tag + 1 for tenant in others)
    for num in count(1):
        for tenant in others:
            queue.add(f"{tenant}{num}", tenant, 1, 0.0)
        if queue.take() == mine[-1]:
            break
    assert num <= bound + 1e-6


@given(st.lists(st.tuples(st.sampled_from(TENANTS), COSTS, st.booleans()), max_size=60))
def test_tags_are_taken_in_order_however_others_arrive_between(steps: list[tuple[str, int, bool]]) -> None:
    queue, tags = FairQueue(), []
    for tenant, amount, take in steps:
        queue.add("", tenant, amount, 0.0)
        if take:
            tags.append(queue.take().tag)
    tags += [queue.take().tag for _ in range(len(queue))]
    assert tags == sorted(tags)


@given(WEIGHTS, BACKLOGS, st.integers(0, 50), st.randoms(use_true_random=False))
def test_what_is_put_back_has_the_place_that_it_had(
    weights: dict[str, float], backlogs: dict[str, list[int]], num: int, shuffler: random.Random
) -> None:
    order = taken(filled(weights, backlogs))
    queue = filled(weights, backlogs)
    tickets = [queue.take() for _ in range(min(num, len(queue)))]
    shuffler.shuffle(tickets)
    for ticket in tickets:
        queue.put_back(ticket)
    queue.add("late", "a", 1, 0.0)
    assert [id for id in taken(queue) if id != "late"] == order


# --- priorities ------------------------------------------------------------------------------------------------------


def test_only_a_priority_below_zero_goes_ahead() -> None:
    queue = FairQueue()
    for priority in (7, 0, -1, -7):
        queue.add(str(priority), "a", 1, submitted_s=0.0, priority=priority)
    assert taken(queue) == ["-1", "-7", "7", "0"]


@given(st.integers(0, 30))
def test_who_waits_behind_an_endless_flood_of_priority_is_served_when_aged(num_before: int) -> None:
    """A request ahead comes every second, and one is served; `num_before` were there at the start."""
    queue = FairQueue()
    queue.add("old", "a", 1, submitted_s=0.0)
    for _ in range(num_before):
        queue.add("ahead", "b", 1, submitted_s=0.0, priority=-1)
    for now in count(1):
        queue.add("ahead", "b", 1, submitted_s=float(now), priority=-1)
        if queue.take().id == "old":
            break
    assert now == num_before + AGEING_S


# --- as the rules say ------------------------------------------------------------------------------------------------


class Plain:
    """The rules of `fair.py`, word for word: every F is remembered, every place is searched."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.virtual_time = {True: 0.0, False: 0.0}
        self.finish: dict[tuple[bool, str], float] = {}
        self.waiting: list[Ticket] = []

    def of_class(self, ahead: bool) -> list[Ticket]:
        return sorted(ticket for ticket in self.waiting if ticket.ahead is ahead)

    def tag(self, tenant: str, amount: int, ahead: bool) -> float:
        tag = max(self.virtual_time[ahead], self.finish.get((ahead, tenant), 0.0))
        self.finish[ahead, tenant] = tag + amount / self.weights[tenant]
        return tag

    def take(self) -> Ticket:
        ahead, rest = self.of_class(True)[:1], self.of_class(False)[:1]
        aged = ahead and rest and ahead[0].submitted_s - rest[0].submitted_s >= AGEING_S
        ticket = (rest + ahead if aged else ahead + rest)[0]
        self.virtual_time[ticket.ahead] = max(self.virtual_time[ticket.ahead], ticket.tag)
        self.remove(ticket)
        return ticket

    def remove(self, ticket: Ticket) -> None:
        self.waiting.remove(ticket)
        if not self.of_class(ticket.ahead):
            self.virtual_time[ticket.ahead] = max(
                tag for (ahead, _), tag in self.finish.items() if ahead is ticket.ahead
            )


MOVES = st.sampled_from(["add", "add", "take", "put back", "remove"])
STEPS = st.tuples(MOVES, st.sampled_from(TENANTS), COSTS, PRIORITIES)


@given(WEIGHTS, st.lists(STEPS, max_size=60))
def test_every_move_is_as_the_rules_say(weights: dict[str, float], steps: list[tuple[str, str, int, int]]) -> None:
    queue, plain, running = FairQueue(weights), Plain(weights), list[Ticket]()
    for now, (move, tenant, amount, priority) in enumerate(steps):
        if move == "add":
            ticket = queue.add(f"{now}", tenant, amount, float(now), priority)
            assert ticket.tag == plain.tag(tenant, amount, priority < 0)
            plain.waiting.append(ticket)
            position = sorted(plain.waiting, key=lambda other: (not other.ahead, other)).index(ticket)
            assert queue.position(ticket) == position
        elif move == "take" and plain.waiting:
            running.append(queue.take())
            assert running[-1] is plain.take()
        elif move == "put back" and running:
            plain.waiting.append(ticket := running.pop(amount % len(running)))
            queue.put_back(ticket)
        elif move == "remove" and plain.waiting:
            queue.remove(ticket := plain.waiting[amount % len(plain.waiting)])
            plain.remove(ticket)
        assert len(queue) == len(plain.waiting)
        assert queue.oldest_s() == min((ticket.submitted_s for ticket in plain.waiting), default=inf)
        assert queue.num_tenants <= 2 * len(TENANTS)
    taken(queue)
    assert queue.num_tenants == 0


def test_tenants_that_come_once_are_not_remembered() -> None:
    queue = FairQueue()
    for i in range(1000):
        queue.add(str(i), f"tenant {i}", 10, 0.0)
        queue.add(str(i), "a", 10, 0.0)
        taken(queue, 1 + i % 2)
    taken(queue)
    assert queue.num_tenants == 0
