"""The scheduler against a fake network whose next id depends on every id it can read through the block table."""

import zlib
from dataclasses import dataclass, field, replace

import pytest

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
