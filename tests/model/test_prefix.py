"""Finding what was computed before: by name, only when it is complete, and never another's."""

from dataclasses import replace

import pytest

from model.cache.names import following, root
from model.engine.sequence import Sequence
from model.request import Request
from tests.model.test_scheduler import ROOMY, Bench

SHARING = replace(ROOMY, prefix_cache=True)
PROMPT = tuple(range(2, 15))  # three full blocks of four, and a token


def ask(bench: Bench, id: str, prompt: tuple[int, ...] = PROMPT, tenant: str = "default", salt: str = "") -> Sequence:
    return bench.take(Request(id, prompt, tenant=tenant, cache_salt=salt))


def test_names_depend_on_every_id_before_and_on_whose_they_are() -> None:
    roots = [root("a", ""), root("a", "s"), root("as", ""), root("", "as"), root("a1:s", ""), root("\ud800", "")]
    names = [following(each, ids) for each in roots for ids in ((1, 2), (2, 1), (2**32 - 1, 2))]
    names += [following(names[0], (1, 2))]
    assert len({*roots, *names}) == len(roots) + len(names)


def test_a_second_prompt_computes_only_what_is_new() -> None:
    bench = Bench(SHARING)
    first = ask(bench, "a")
    assert [bench.step()[0] for _ in range(2)] == [{"a": 10}, {"a": 3}]
    second, third = ask(bench, "b", (*PROMPT[:9], 1, 1, 1)), ask(bench, "c", PROMPT[:8])
    assert bench.step()[0] == {"a": 1, "b": 4, "c": 4}
    assert first.blocks[:2] == second.blocks[:2] and first.blocks[:1] == third.blocks[:1]
    assert first.blocks[1] != third.blocks[1]  # with its last token: that one is computed to draw from
    assert (second.num_cached, third.num_cached) == (8, 4)
    assert (bench.scheduler.prefixes.num_asked, bench.scheduler.prefixes.num_found) == (33, 12)


@pytest.mark.parametrize(("tenant", "salt"), [("other", ""), ("default", "s")])
def test_what_is_anothers_is_not_found(tenant: str, salt: str) -> None:
    bench = Bench(SHARING)
    ask(bench, "a")
    bench.step()
    bench.step()
    other = ask(bench, "b", tenant=tenant, salt=salt)
    assert bench.step()[0] == {"a": 1, "b": 9}
    assert other.num_cached == 0


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    bench = Bench(SHARING)
    choices = [ask(bench, id) for id in "abc"]
    assert [bench.step()[0] for _ in range(3)] == [{"a": 10}, {"a": 3}, {"a": 1, "b": 1, "c": 1}]
    assert [each.num_cached for each in choices] == [0, 12, 12]
    assert len({tuple(each.blocks[:3]) for each in choices}) == 1


def test_who_waits_for_one_that_leaves_computes_by_itself() -> None:
    bench = Bench(SHARING)
    ask(bench, "a")
    waiting = ask(bench, "b")
    plan = bench.scheduler.plan()
    assert [chunk.sequence.id for chunk in plan.chunks] == ["a"]
    bench.scheduler.finish("a")
    assert bench.scheduler.prefixes.is_coming(waiting) is False
    bench.scheduler.commit(plan, {})
    assert bench.step()[0] == {"b": 10}


def test_nothing_is_found_before_it_is_committed() -> None:
    bench = Bench(SHARING)
    ask(bench, "a", PROMPT[:9])
    plan = bench.scheduler.plan()
    bench.scheduler.advance(plan)
    waiting = ask(bench, "b")
    assert [chunk.sequence.id for chunk in bench.scheduler.plan().chunks] == ["a"]
    assert waiting.blocks == []
    bench.scheduler.commit(plan, bench.compute(plan))
    bench.scheduler.plan()
    assert waiting.num_cached == 8


def test_what_is_spoilt_is_not_found_and_what_others_own_stays_theirs() -> None:
    bench = Bench(SHARING)
    bad = ask(bench, "a")
    bench.step()
    bench.step()
    good = ask(bench, "b")
    bench.step()
    shared = list(good.blocks)
    bench.scheduler.spoil(bad)
    bench.scheduler.finish("a")
    assert ask(bench, "c").num_cached == 0
    bench.step()
    assert good.blocks[: len(shared)] == shared and bench.scheduler.pool.num_owners(shared[0]) == 1


def test_the_preempted_find_what_nobody_has_taken_and_count_it_once() -> None:
    bench = Bench(replace(SHARING, num_blocks=10))
    ask(bench, "a")
    second = ask(bench, "b", PROMPT[::-1])
    while second.num_total < 20:
        bench.step()
    assert (bench.step()[0], bench.scheduler.num_preemptions, second.blocks) == ({"a": 1}, 1, [])
    bench.scheduler.finish("a")
    assert bench.step()[0] == {"b": 4}  # "a" took the last of its five blocks, which was not full
    assert (second.num_cached, bench.scheduler.prefixes.num_found) == (0, 0)


def test_another_workers_output_is_found_too() -> None:
    bench = Bench(SHARING)
    sequence = ask(bench, "a")
    for _ in range(8):
        bench.step()
    bench.scheduler.finish("a")
    again = bench.take(sequence.request, tuple(sequence.output_ids))
    assert bench.step()[0] == {"a": again.num_total - 1 - 16}
    assert again.num_cached == 13  # of the prompt, which it need not draw from


def test_without_the_cache_everything_is_computed() -> None:
    bench = Bench(ROOMY)
    ask(bench, "a", PROMPT[:9])
    ask(bench, "b", PROMPT[:9])
    assert [bench.step()[0] for _ in range(2)] == [{"a": 9, "b": 1}, {"a": 1, "b": 8}]


def test_a_preemption_costs_what_others_have_taken_and_no_more() -> None:
    bench = Bench(replace(SHARING, max_model_len=60, num_blocks=30))
    sequences = [ask(bench, str(i), tuple(range(2 + i, 12 + i))) for i in range(8)]
    total = num_evicted = 0
    while bench.scheduler.has_work:
        kept = set(bench.scheduler.pool._kept)
        total += sum(bench.step()[0].values())
        num_evicted += len({block for block in kept if bench.scheduler.pool._names[block] is None})
    num_again = total - sum(each.num_total - 1 for each in sequences)
    num_preemptions = bench.scheduler.num_preemptions
    # Beside the blocks that were taken: of each the one that was not full, and the one with the last token.
    assert num_preemptions > 3 and 0 < num_again <= 4 * num_evicted + 8 * num_preemptions
