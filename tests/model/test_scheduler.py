"""The scheduler against a fake network whose next id depends on every id it can read through the block table."""

import zlib
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.config import EngineConfig
from model.engine.reach import Reach
from model.engine.scheduler import Outcome, Scheduler, StepPlan
from model.engine.sequence import HOLE, Sequence
from model.kinds import RANDOM_BLOCK, CacheNeeds
from model.request import Finish, FinishReason, Request, SamplingParams

ROOMY = EngineConfig(
    max_model_len=100, max_num_seqs=8, max_batch_tokens=10, block_size=4, num_blocks=100, prefix_cache=False
)
EOS, STOP_ID = 0, 1
ALL = CacheNeeds()


def next_id(context: list[int], needs: CacheNeeds = ALL) -> int:
    return zlib.crc32(bytes(context[at] for at in seen(len(context) - 1, needs))) % 16


def seen(position: int, needs: CacheNeeds) -> list[int]:
    """Positions of the tokens that must be in blocks when the one at `position` is computed."""
    if needs.num_last is None:
        return list(range(position + 1))
    last = needs.num_last
    found = {*range(min(needs.num_first, position + 1)), *range(max(0, position - last + 1), position + 1)}
    for block in needs.kept(position):
        found |= set(range(block * RANDOM_BLOCK, (block + 1) * RANDOM_BLOCK))
    return sorted(found) if last else []


@dataclass
class Bench:
    """A scheduler, and a network and a cache that are two dicts. A state is all ids that it has met."""

    config: EngineConfig = ROOMY
    scheduler: Scheduler = field(init=False)
    cells: dict[int, int] = field(default_factory=dict)  # flat cache position -> token id
    states: dict[int, list[int]] = field(default_factory=dict)  # slot -> token ids

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)

    def add(
        self, id: str, num_prompt: int, so_far: tuple[int, ...] = (), priority: int = 0, **sampling: int
    ) -> Sequence:
        params = SamplingParams(**{"max_tokens": 1000, **sampling})  # type: ignore[arg-type]
        return self.take(Request(id, tuple(range(2, 2 + num_prompt)), params, priority=priority), so_far)

    def take(self, request: Request, so_far: tuple[int, ...] = ()) -> Sequence:
        sequence = Sequence(request, self.config.max_model_len, list(so_far))
        self.scheduler.add(sequence)
        return sequence

    def compute(self, plan: StepPlan) -> dict[str, int]:
        drawn, size = {}, self.config.block_size
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            needs, state = self.config.needs, sequence.ids(0, end)
            if not needs.is_shareable:
                met = self.states.get(sequence.slot, []) if chunk.start else []
                assert met == state[: chunk.start], "a state of another, or of other tokens"
                self.states[sequence.slot] = state
            for at in range(chunk.start, end if sequence.blocks else chunk.start):
                self.cells[sequence.blocks[at // size] * size + at % size] = state[at]
            for at in range(chunk.start if needs.num_last else end - 1, end):
                places = {place: sequence.blocks[place // size] for place in seen(at, needs)}
                assert HOLE not in places.values(), "a token that is needed was given back"
                assert all(self.cells[block * size + p % size] == state[p] for p, block in places.items())
            if chunk.draws:
                drawn[sequence.id] = next_id(state, needs)
        return drawn

    def step(self) -> tuple[dict[str, int], list[Outcome]]:
        """The number of tokens computed for each sequence, and what became of them."""
        plan = self.scheduler.plan()
        outcomes = self.scheduler.commit(plan, self.compute(plan))
        return {chunk.sequence.id: chunk.num_tokens for chunk in plan.chunks}, outcomes


def alone(request: Request, config: EngineConfig) -> tuple[list[int], Finish]:
    """What a request must give, written down without a scheduler."""
    sampling, context, outputs = request.sampling, list(request.prompt_ids), list[int]()
    while True:
        if outputs and outputs[-1] in sampling.stop_token_ids and len(outputs) > sampling.min_tokens:
            eos = outputs[-1] in sampling.eos_ids
            return outputs, Finish(FinishReason.STOP, stop_reason=None if eos else outputs[-1])
        if len(outputs) == sampling.max_tokens or len(context) >= config.max_model_len:
            return outputs, Finish(FinishReason.LENGTH)
        if Reach(config.needs, config.block_size).num_needed(len(context)) > config.num_blocks:
            return outputs, Finish(FinishReason.ERROR)
        outputs.append(next_id(context, config.needs))
        context.append(outputs[-1])


def ends(outcomes: list[Outcome]) -> list[tuple[str, FinishReason]]:
    return [(outcome.sequence.id, outcome.finish.reason) for outcome in outcomes if outcome.finish]


def test_a_prompt_is_computed_in_chunks_and_draws_at_its_end() -> None:
    bench = Bench()
    sequence = bench.add("a", 23)
    plans = []
    for num_blocks in (3, 5, 6, 6, 7):
        plans.append(plan := bench.scheduler.plan())
        assert len(sequence.blocks) == num_blocks  # only as many as this chunk needs
        bench.scheduler.commit(plan, bench.compute(plan))
    chunks = [(chunk.start, chunk.num_tokens, chunk.draws) for plan in plans for chunk in plan.chunks]
    assert chunks == [(0, 10, False), (10, 10, False), (20, 3, True), (23, 1, True), (24, 1, True)]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    bench = Bench()
    bench.add("a", 4)
    bench.add("b", 4)
    bench.step()
    bench.add("long", 20)
    bench.add("next", 3)
    assert [bench.step()[0] for _ in range(4)] == [
        {"a": 1, "b": 1, "long": 8},
        {"a": 1, "b": 1, "long": 8},
        {"a": 1, "b": 1, "long": 4, "next": 3},
        {"a": 1, "b": 1, "long": 1, "next": 1},
    ]


def test_decoding_goes_on_beside_long_prompts_of_better_rank() -> None:
    bench = Bench()
    bench.add("low", 4, priority=2)
    bench.step()
    bench.add("middle", 40, priority=1)
    bench.step()
    bench.add("high", 20)
    assert [bench.step()[0] for _ in range(3)] == [
        {"high": 9, "low": 1},
        {"high": 9, "low": 1},
        {"high": 2, "middle": 7, "low": 1},
    ]


def test_a_prompt_goes_on_however_many_decode() -> None:
    bench = Bench(replace(ROOMY, max_num_seqs=4, max_batch_tokens=4))
    for id in "abc":
        bench.add(id, 1)
    bench.step()
    bench.add("long", 3)
    assert [bench.step()[0]["long"] for _ in range(4)] == [1, 1, 1, 1]


def test_fewer_tokens_a_step_than_sequences_serves_them_in_order() -> None:
    bench = Bench(replace(ROOMY, max_batch_tokens=2))
    for id in "abcd":
        bench.add(id, 1, max_tokens=2)
    steps = [bench.step() for _ in range(4)]
    assert [sorted(counts) for counts, _ in steps] == [["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]
    assert not bench.scheduler.has_work


def test_seats_go_by_priority_then_arrival() -> None:
    bench = Bench(replace(ROOMY, max_num_seqs=1))
    for id, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0)):
        bench.add(id, 2, priority=priority, max_tokens=1)
    assert [id for _ in range(4) for id, _ in ends(bench.step()[1])] == ["c", "b", "d", "a"]


def test_a_better_priority_overtakes_a_prompt_under_way() -> None:
    bench = Bench()
    bench.add("low", 40, priority=1)
    bench.step()
    bench.add("high", 8)
    assert bench.step()[0] == {"high": 8, "low": 2}


def test_nobody_is_admitted_into_blocks_that_others_need() -> None:
    bench = Bench(replace(ROOMY, num_blocks=10))
    bench.add("a", 20, max_tokens=4)  # 5 blocks and one to grow, though it has only 3 after the first step
    bench.add("b", 12, max_tokens=4)  # 3 blocks and one to grow: one too many
    bench.add("c", 1, max_tokens=4)  # would fit, but comes after b
    steps = [bench.step()[0] for _ in range(7)]
    assert steps == [{"a": 10}, {"a": 10}, {"a": 1}, {"a": 1}, {"a": 1}, {"b": 10}, {"b": 2, "c": 1}]
    assert bench.scheduler.num_preemptions == 0


def run_out(priorities: dict[str, int]) -> tuple[Bench, dict[str, Sequence]]:
    """Sequences that decode until one has three blocks; there are two for each. `later` waits all the time."""
    bench = Bench(replace(ROOMY, block_size=8, num_blocks=len(priorities) * 2))
    sequences = {id: bench.add(id, 2, priority=priority) for id, priority in priorities.items()}
    bench.step()
    bench.add("later", 2)
    while max(len(sequence.blocks) for sequence in sequences.values()) < 3:
        bench.step()
    return bench, sequences


@pytest.mark.parametrize(
    ("priorities", "victim"),
    [({"a": 0, "b": 0, "c": 0}, "c"), ({"a": 0, "b": 1, "c": 0}, "b"), ({"a": 0, "b": 0}, "b")],
)
def test_the_worst_rank_is_preempted_and_keeps_its_outputs(priorities: dict[str, int], victim: str) -> None:
    bench, sequences = run_out(priorities)
    assert bench.scheduler.num_preemptions == 1
    assert [id for id, sequence in sequences.items() if not sequence.blocks] == [victim]
    assert (sequences[victim].num_computed, len(sequences[victim].output_ids)) == (0, 15)
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (2, len(priorities) - 1)


def test_the_worst_rank_waits_with_its_blocks_until_somebody_needs_them() -> None:
    bench = Bench(replace(ROOMY, max_batch_tokens=3, block_size=1, num_blocks=24))
    low = bench.add("low", 1, priority=1)
    bench.step()
    bench.add("high", 20)
    assert [bench.step()[0] for _ in range(7)] == [{"high": 2, "low": 1}] * 7
    assert (bench.step()[0], len(low.blocks)) == ({"high": 2}, 8)
    assert (bench.step()[0], len(low.blocks)) == ({"high": 3}, 0)


def test_nobody_is_preempted_for_one_whose_turn_it_is_not() -> None:
    bench = Bench(replace(ROOMY, max_batch_tokens=3, block_size=1, num_blocks=39))
    bench.add("low", 1, priority=2)
    bench.step()
    bench.add("middle", 9, priority=1)
    bench.step()
    bench.add("high", 24)
    assert [bench.step()[0] for _ in range(12)] == [{"high": 2, "low": 1}] * 11 + [{"high": 2}]
    assert (bench.scheduler.pool.num_free, bench.scheduler.num_preemptions) == (0, 0)


def test_the_preempted_comes_back_before_later_arrivals_and_catches_up() -> None:
    bench, sequences = run_out({"a": 0, "b": 0})
    before = list(sequences["b"].output_ids)
    bench.scheduler.finish("a")
    assert [bench.step()[0] for _ in range(2)] == [{"b": 10}, {"b": 7}]
    assert sequences["b"].output_ids == [*before, next_id([2, 3, *before])]


def test_a_sequence_larger_than_the_cache_ends_with_an_error_at_once() -> None:
    bench = Bench(replace(ROOMY, num_blocks=2))
    bench.add("a", 9)
    assert bench.scheduler.has_work
    [outcome] = bench.step()[1]
    message = "9 tokens need 3 cache blocks of 4 tokens, and the cache has 2"
    assert (outcome.num_new, outcome.finish) == (0, Finish(FinishReason.ERROR, error=message))
    assert not bench.scheduler.has_work


def test_a_sequence_that_outgrows_the_cache_ends_with_an_error() -> None:
    bench = Bench(replace(ROOMY, num_blocks=2))
    sequence = bench.add("a", 7)
    assert [ends(bench.step()[1]) for _ in range(2)] == [[], [("a", FinishReason.ERROR)]]
    assert len(sequence.output_ids) == 2  # the eighth token still fitted, the ninth was drawn but can't go on
    assert (bench.scheduler.pool.num_free, bench.scheduler.has_work) == (2, False)


def test_output_that_is_complete_on_arrival_just_ends() -> None:
    bench = Bench()
    sequence = bench.add("a", 3, so_far=(5, 6), max_tokens=2)
    assert bench.step() == ({}, [Outcome(sequence, 0, Finish(FinishReason.LENGTH))])


@pytest.mark.parametrize("num_steps", [0, 1, 3])  # waiting, in the middle of its prompt, decoding
def test_finish_frees_the_blocks_in_every_state(num_steps: int) -> None:
    bench = Bench()
    bench.add("a", 12)
    for _ in range(num_steps):
        bench.step()
    assert bench.scheduler.finish("a")
    assert (bench.scheduler.pool.num_used, bench.scheduler.has_work) == (0, False)
    assert not bench.scheduler.finish("a")


def test_finish_reaches_a_preempted_sequence() -> None:
    bench, _ = run_out({"a": 0, "b": 0})
    assert bench.scheduler.finish("b")
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (1, 1)


def test_commit_passes_over_a_sequence_finished_since_the_plan() -> None:
    bench = Bench()
    bench.add("a", 2)
    bench.add("b", 2)
    plan = bench.scheduler.plan()
    drawn = bench.compute(plan)
    bench.scheduler.finish("a")
    del drawn["a"]
    assert [outcome.sequence.id for outcome in bench.scheduler.commit(plan, drawn)] == ["b"]


WINDOW_NEEDS = st.builds(
    lambda first, last, num: CacheNeeds(first, last + (RANDOM_BLOCK if num else 0), ((last, num),) * (num > 0), False),
    st.integers(0, 5), st.integers(1, 6), st.integers(0, 2),
)  # fmt: skip
ANY_NEEDS = st.one_of(st.just(CacheNeeds()), st.just(CacheNeeds(num_last=0, is_shareable=False)), WINDOW_NEEDS)


class AnyWorkload(RuleBasedStateMachine):
    """Random requests, priorities, take-overs and cancellations on tiny caches and budgets."""

    @initialize(
        num_seqs=st.integers(1, 6), budget=st.integers(1, 12), size=st.integers(1, 4), num_blocks=st.integers(1, 14),
        max_len=st.integers(2, 40), prefix_cache=st.booleans(), needs=ANY_NEEDS,
    )  # fmt: skip
    def start(
        self,
        num_seqs: int,
        budget: int,
        size: int,
        num_blocks: int,
        max_len: int,
        prefix_cache: bool,
        needs: CacheNeeds,
    ) -> None:
        config = EngineConfig("cpu", "float32", max_len, num_seqs, budget, size, num_blocks, prefix_cache)
        self.bench = Bench(replace(config, needs=needs, prefix_cache=prefix_cache and needs.is_shareable))
        self.scheduler = self.bench.scheduler
        self.alive: dict[str, Sequence] = {}
        self.num_added = 0

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=20).map(tuple), max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 5), stops=st.sampled_from([(), (EOS,), (STOP_ID, EOS)]),
        priority=st.integers(0, 2), done=st.integers(0, 4), whose=st.sampled_from(["a", "b"]),
    )  # fmt: skip
    def add(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        min_tokens: int,
        stops: tuple[int, ...],
        priority: int,
        done: int,
        whose: str,
    ) -> None:
        self.num_added += 1
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stops, eos_ids=(EOS,))
        request = Request(str(self.num_added), prompt, params, tenant=whose, priority=priority)
        so_far = alone(request, self.bench.config)[0][:done]  # as another worker would have left it
        self.alive[request.id] = self.bench.take(request, tuple(so_far))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.alive)))
        if self.scheduler.finish(id):
            assert not self.alive.pop(id).blocks

    @rule()
    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan.num_tokens == sum(chunk.num_tokens for chunk in plan.chunks) <= self.bench.config.max_batch_tokens
        assert len({chunk.sequence.id for chunk in plan.chunks}) == len(plan.chunks) <= self.bench.config.max_num_seqs
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_computed and chunk.num_tokens > 0
            assert chunk.draws == (chunk.num_tokens == chunk.sequence.gap)
            assert len(chunk.sequence.blocks) == self.num_blocks(chunk.start + chunk.num_tokens)
        planned = {chunk.sequence.id: chunk.num_tokens for chunk in plan.chunks}
        if plan.num_tokens < self.bench.config.max_batch_tokens and self.scheduler.pool.num_free:
            # Nobody who runs is held back without a reason.
            is_coming = self.scheduler.prefixes.is_coming
            assert all(planned.get(id) == each.gap or is_coming(each) for id, each in self.alive.items() if each.blocks)
        outcomes = self.scheduler.commit(plan, self.bench.compute(plan))
        assert plan.chunks or outcomes or not self.alive  # something happens in every step
        self.enter(outcomes)

    @rule()
    def two_steps_of_a_device_that_runs_ahead(self) -> None:
        """The second is planned before the first is told, and computed for whoever has not ended with it."""
        first = self.scheduler.plan()
        drawn = self.bench.compute(first)
        self.scheduler.advance(first)
        second = self.scheduler.plan()
        self.enter(self.scheduler.commit(first, drawn))
        left = tuple(chunk for chunk in second.chunks if self.scheduler.owns(chunk.sequence))
        second = replace(second, chunks=left)
        self.enter(self.scheduler.commit(second, self.bench.compute(second)))

    def enter(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            sequence = outcome.sequence
            assert sequence.num_total <= max(self.bench.config.max_model_len, sequence.num_prompt)
            if outcome.finish:
                del self.alive[sequence.id]  # KeyError: it ended twice
                expected = alone(sequence.request, self.bench.config)
                assert (sequence.output_ids, replace(outcome.finish, error=None)) == expected

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "alive"):
            return
        owners: dict[int, list[str]] = {}
        for sequence in self.alive.values():
            for block in sequence.owned():
                owners.setdefault(block, []).append(sequence.request.tenant)
            assert len(sequence.owned()) == sequence.num_owned <= self.most_blocks(sequence)
        pool = self.scheduler.pool
        assert {block: pool.num_owners(block) for block in range(pool.num_blocks) if pool.num_owners(block)} == {
            block: len(found) for block, found in owners.items()
        }
        assert pool.num_used == len(owners)
        assert all(len(set(found)) == 1 for found in owners.values())  # tenants never share
        assert all(len(each.blocks) == self.num_blocks(each.num_computed) for each in self.alive.values())
        num_seats = min(self.bench.config.max_num_seqs, self.bench.config.max_batch_tokens)
        slots = [each.slot for each in self.alive.values() if each.slot >= 0]
        assert len(set(slots)) == len(slots) == self.scheduler.num_running <= num_seats
        assert all(slot < num_seats for slot in slots)
        assert all(each.slot >= 0 for each in self.alive.values() if each.blocks)

    def teardown(self) -> None:
        """Everybody ends: while the best rank waits, the best running one ends; then it runs, and ends itself."""
        if not hasattr(self, "alive"):
            return
        for _ in range(2 * self.bench.config.max_model_len * len(self.alive)):
            self.step()
            self.books_balance()
        assert not self.alive and not self.scheduler.has_work
        assert self.scheduler.pool.num_used == 0

    def most_blocks(self, sequence: Sequence) -> int:
        """However long it is."""
        reach = Reach(self.bench.config.needs, self.bench.config.block_size)
        return reach.num_wanted(sequence.num_total, self.bench.config.max_batch_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        if self.bench.config.needs.num_last == 0:
            return 0
        return -(-num_tokens // self.bench.config.block_size)


AnyWorkload.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyWorkload = AnyWorkload.TestCase
