"""The scheduler under any workload: what must hold after every step, whatever came before it."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.config import EngineConfig
from model.engine.reach import Reach
from model.engine.scheduler import Outcome
from model.engine.sequence import Sequence
from model.kinds import RANDOM_BLOCK, CacheNeeds
from model.request import Request, SamplingParams
from tests.model.test_scheduler import EOS, STOP_ID, Bench, alone

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
