"""Requests that answer a source: batched = alone to the bit, whatever happens on the way; slots and budgets."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.paths import make_runner
from model.engine.runner import Runner
from model.engine.scheduler import Scheduler
from model.engine.sequence import Sequence
from model.nn.decoder import Decoder
from model.request import Delta, FinishReason, Request, SamplingParams
from model.tokenizer import Tokenizer
from tests.model.conftest import random_decoder
from tests.model.test_encoder_decoder import VANILLA, dense_logits

BYTES = replace(VANILLA, vocab_size=256)
RELATIVE = replace(
    BYTES, family="t5", norm="rmsnorm", position="relative", relative_buckets=8, relative_distance=20, post_norm=False,
    scaled_embedding=False, scaled_scores=False, qkv_bias=False, out_bias=False, mlp_bias=False,
)  # fmt: skip
KINDS = {"2017": BYTES, "relative": RELATIVE}


@pytest.fixture(scope="module", params=KINDS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return random_decoder(KINDS[request.param])


def engine_of(decoder: Decoder, tokenizer: Tokenizer, **changes: int) -> Engine:
    config = EngineConfig(**{"max_model_len": 512, "num_blocks": 256, **changes})  # type: ignore[arg-type]
    return Engine(decoder, tokenizer, config, Runner(decoder, config))


def asks(id: str, num_source: int, seed: int = 0, temperature: float = 0.0, max_tokens: int = 24) -> Request:
    source = tuple((7 * i + 13 * num_source) % 256 for i in range(num_source))
    sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, num_logprobs=2)
    return Request(id, (0,), sampling, source_ids=source)


def run(engine: Engine, requests: Seq[Request]) -> dict[str, list[Delta]]:
    """All deltas by id."""
    for request in requests:
        engine.add(request)
    told: dict[str, list[Delta]] = {request.id: [] for request in requests}
    while engine.has_work():
        for delta in engine.step():
            told[delta.id].append(delta)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return told


def answers(told: dict[str, list[Delta]]) -> dict[str, list[object]]:
    """Ids, log-probabilities and ends; how far a prompt has come is left out."""
    kept = {id: [d for d in deltas if d.token_ids or d.finish] for id, deltas in told.items()}
    return {id: [(d.token_ids, d.logprobs, d.finish) for d in deltas] for id, deltas in kept.items()}


MIXED = [asks("a", 3), asks("b", 200, temperature=1.0, seed=5), asks("c", 129), asks("d", 1, temperature=0.7, seed=9)]


def test_step_by_step_over_the_cache_is_all_at_once(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    request = asks("a", 150)
    (told,) = run(engine_of(decoder, byte_tokenizer), [request]).values()
    out = [i for delta in told for i in delta.token_ids]
    logits = dense_logits(decoder, [list(request.source_ids)], [[0, *out[:-1]]])[0]
    ours = torch.tensor([delta.logprobs[0].logprob for delta in told if delta.token_ids])
    theirs = logits.log_softmax(-1)[torch.arange(len(out)), torch.tensor(out)]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert out == logits.argmax(-1).tolist()


def test_batched_is_alone_to_the_bit(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    together = answers(run(engine_of(decoder, byte_tokenizer), MIXED))
    for request in MIXED:
        assert answers(run(engine_of(decoder, byte_tokenizer), [request]))[request.id] == together[request.id]


def test_preempted_is_undisturbed_to_the_bit(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    longer = [replace(each, sampling=replace(each.sampling, max_tokens=40)) for each in MIXED]
    wanted = answers(run(engine_of(decoder, byte_tokenizer), longer))
    small = engine_of(decoder, byte_tokenizer, num_blocks=4, max_batch_tokens=64)
    assert answers(run(small, longer)) == wanted
    assert small.stats().preemptions_total > 0


def test_taken_over_is_unbroken(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    request = asks("a", 40, temperature=1.0, seed=3)
    whole = [i for d in run(engine_of(decoder, byte_tokenizer), [request])["a"] for i in d.token_ids]
    other = engine_of(decoder, byte_tokenizer)
    other.add(request, whole[:10])
    rest: list[int] = []
    while other.has_work():
        rest += [i for delta in other.step() for i in delta.token_ids]
    assert rest == whole[10:]


def test_a_slot_that_was_cancelled_serves_the_next(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    engine = engine_of(decoder, byte_tokenizer, max_num_seqs=1)
    engine.add(asks("long", 300))
    engine.step()
    engine.cancel("long")
    wanted = answers(run(engine_of(decoder, byte_tokenizer), [MIXED[0]]))
    assert answers(run(engine, [MIXED[0]])) == wanted


def test_sources_that_no_network_reads_end_as_errors(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    engine = engine_of(decoder, byte_tokenizer)
    for bad in (Request("none", (0,)), asks("long", 513)):
        (delta,) = run(engine, [bad])[bad.id]
        assert delta.finish is not None and delta.finish.reason == FinishReason.ERROR
        assert "source tokens, expected 1 to 512" in (delta.finish.error or "")


def test_numbers_that_are_not_finite_end_their_own_request(byte_tokenizer: Tokenizer) -> None:
    spoilt = random_decoder(replace(BYTES, tied_head=False))
    good = asks("good", 40)
    wanted = answers(run(engine_of(spoilt, byte_tokenizer), [good]))
    spoilt.embed.weight[77] = torch.nan
    bad = Request("bad", (0,), SamplingParams(temperature=0, max_tokens=4), source_ids=(5, 77))
    engine = engine_of(spoilt, byte_tokenizer, max_num_seqs=1)
    told = run(engine, [bad, good])
    assert told["bad"][-1].finish is not None and "not finite" in (told["bad"][-1].finish.error or "")
    assert answers(told)["good"] == wanted["good"]


def test_the_plain_runner_computes_it_and_the_log_says_so(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(decoder, EngineConfig(num_blocks=8))
    assert type(runner) is Runner
    assert [record.getMessage() for record in caplog.records] == [
        "this CPU runs without the native core, several times slower: it computes decoders without an encoder"
    ]


def test_prefixes_are_not_shared_where_they_decide_nothing(decoder: Decoder, byte_tokenizer: Tokenizer) -> None:
    engine = engine_of(decoder, byte_tokenizer)
    requests = [
        replace(asks(name, num, max_tokens=3), prompt_ids=(0, *range(40))) for name, num in (("a", 5), ("b", 6))
    ]
    together = answers(run(engine, requests))
    assert engine.stats().prefix_found_total == 0
    assert answers(run(engine_of(decoder, byte_tokenizer), requests[1:]))["b"] == together["b"]


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=12), st.integers(4, 64))
def test_sources_fit_the_budget_or_come_alone(sizes: list[tuple[int, int]], budget: int) -> None:
    """Under any load each sequence gets through, and a step is over its budget for one source at most."""
    scheduler = Scheduler(EngineConfig(num_blocks=12, max_num_seqs=4, max_batch_tokens=budget, prefix_cache=False))
    for i, (num_source, max_tokens) in enumerate(sizes):
        scheduler.add(Sequence(asks(f"{i}", num_source, max_tokens=max_tokens), 100))
    ended, slots = 0, dict[int, str]()
    for _ in range(2000):
        if not scheduler.has_work:
            break
        plan = scheduler.plan()
        fresh = [chunk for chunk in plan.chunks if chunk.start == 0]
        assert plan.num_tokens == sum(c.num_tokens for c in plan.chunks) + sum(c.sequence.num_source for c in fresh)
        assert plan.num_tokens <= budget or len(fresh) == 1
        assert len({chunk.sequence.slot for chunk in plan.chunks}) == len(plan.chunks)
        slots.update({chunk.sequence.slot: chunk.sequence.id for chunk in fresh})
        assert all(slots[chunk.sequence.slot] == chunk.sequence.id for chunk in plan.chunks)
        drawn = {chunk.sequence.id: 200 for chunk in plan.chunks if chunk.draws}
        ended += sum(outcome.finish is not None for outcome in scheduler.commit(plan, drawn))
    assert ended == len(sizes)
