"""What a grammar allows, and that engines hold to it: alone, in mixed batches, taken over and preempted."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from model.engine.engine import Engine
from model.grammar import MAX_KEPT, Grammars, Matcher, Vocabulary
from model.grammar_check import of_schema
from model.request import Finish, FinishReason, Grammar, Request, SamplingParams, TextOptions
from model.sampling.sampler import Row, edit, sample
from model.tokenizer import Tokenizer
from tests.model.conftest import TINY, MakeEngine, byte_library, random_decoder
from tests.model.helpers_tokenizer import byte_fallback, byte_level

BYTES = Vocabulary([bytes([byte]) for byte in range(256)])
WORD = Grammar("regex", "[a-c]{2,4}")
LIST = of_schema({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 5})
GRAMMARS = [WORD, LIST, Grammar("lark", 'start: "yes" | "no" start'), Grammar("json_object"), None]
STOP, LENGTH = Finish(FinishReason.STOP), Finish(FinishReason.LENGTH)
TOKENIZER = Tokenizer(byte_library())
ID_OF = {TOKENIZER.token_bytes(i)[0]: i for i in range(256)}
EOS = ID_OF[255]  # stands for it where a test says so; no text has that byte


def matcher(grammar: Grammar, ends: Sequence[int] = (), num_ids: int = 256) -> Matcher:
    return Matcher.compiled(grammar, BYTES).fork(ends, num_ids)


def ids_of(bits: bytes) -> list[int]:
    return [i for i in range(len(bits) * 8) if bits[i // 8] >> i % 8 & 1]


def asked(id: str, grammar: Grammar | None, prompt: str = "Once", stop: tuple[str, ...] = (), **how: Any) -> Request:
    sampling = SamplingParams(**{"seed": sum(id.encode()), "max_tokens": 40, **how})
    return Request(id, tuple(TOKENIZER.encode(prompt)), sampling, TextOptions(stop), grammar)


def play(engine: Engine, *requests: Request, so_far: Sequence[int] = ()) -> dict[str, tuple[list[int], Finish]]:
    """All of them in one batch: the ids they were told of, and how they ended."""
    ids: dict[str, list[int]] = {request.id: [] for request in requests}
    ends = {}
    for request in requests:
        engine.add(request, so_far)
    while engine.has_work():
        for delta in engine.step():
            ids[delta.id] += delta.token_ids
            if delta.finish:
                assert delta.id not in ends
                ends[delta.id] = delta.finish
    return {id: (ids[id], ends[id]) for id in ids}


def test_only_what_goes_on_is_allowed_and_the_end_where_it_matches() -> None:
    word = matcher(WORD, ends=[255])
    assert ids_of(word.allowed()) == list(b"abc")
    word.push(ord("a"))
    assert (ids_of(word.allowed()), word.accepts) == (list(b"abc"), False)
    word.push(ord("b"))
    assert (ids_of(word.allowed()), word.accepts) == ([*b"abc", 255], True)
    assert word.finish is None


def test_what_nothing_can_follow_is_complete() -> None:
    word = matcher(WORD, ends=[255])
    for byte in b"abca":
        assert word.finish is None
        word.push(byte)
    assert word.finish == STOP
    assert ids_of(word.allowed()) == []


def test_what_the_grammar_does_not_allow_ends_it_with_an_error() -> None:
    word = matcher(WORD)
    word.push(ord("x"))
    assert word.finish is not None and word.finish.reason is FinishReason.ERROR
    assert word.finish.error is not None and "\n" not in word.finish.error
    assert ids_of(word.allowed()) == []


@pytest.mark.parametrize("num_ids", [256, 257, 290, 320, 1000])
def test_ids_beyond_the_vocabulary_are_never_allowed(num_ids: int) -> None:
    anything = matcher(Grammar("regex", "(?s).*"), ends=[0], num_ids=num_ids)
    bits = anything.allowed()
    assert len(bits) == -(-num_ids // 8)
    assert 0 in ids_of(bits) and max(ids_of(bits)) < 256


def test_control_ids_have_no_text_and_change_nothing() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"<end>"], control=[2])
    found = Matcher.compiled(Grammar("regex", "a(b|<end>)*"), vocabulary).fork([2], 3)
    assert ids_of(found.allowed()) == [0]
    found.push(0)
    assert ids_of(found.allowed()) == [1, 2]
    found.push(2)
    assert ids_of(found.allowed()) == [1, 2]


def test_ids_that_spell_nothing_are_never_allowed() -> None:
    gaps = Vocabulary([b"a", b"", b"b", b""])
    assert ids_of(Matcher.compiled(Grammar("regex", "[ab]+"), gaps).fork([], 4).allowed()) == [0, 2]


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte_level", "byte_fallback"])
@pytest.mark.parametrize("seed", range(5))
def test_a_walk_in_any_kind_of_tokenizer_gives_text_that_matches(tokenizer: Tokenizer, seed: int) -> None:
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    schema = {"type": "object", "properties": {"the": {"type": "string", "maxLength": 8}}, "required": ["the"]}
    walk = Matcher.compiled(
        of_schema({**schema, "additionalProperties": False}), Vocabulary(pieces, tokenizer.control_ids)
    )
    walk, ids, draw = walk.fork([], tokenizer.vocab_size), [], random.Random(seed)
    while walk.finish is None:
        ids.append(draw.choice(ids_of(walk.allowed())))
        walk.push(ids[-1])
    prompt = tokenizer.encode("the")
    text = tokenizer.detokenizer(prompt)
    found = json.loads("".join(map(text.push, ids)) + text.flush())
    assert list(found) == ["the"] and len(found["the"]) <= 8


def test_a_row_without_a_grammar_is_untouched_and_a_masked_one_keeps_what_is_allowed() -> None:
    raw = torch.randn(3, 11)
    allowed = (1 << 3 | 1 << 9).to_bytes(2, "little")
    rows = [Row(SamplingParams(), (), (), bits) for bits in (None, allowed, None)]
    scores = edit(raw, rows)
    assert torch.equal(scores[0], raw[0]) and torch.equal(scores[2], raw[2])
    assert scores[1].isfinite().nonzero().flatten().tolist() == [3, 9]
    assert torch.equal(scores[1, [3, 9]], raw[1, [3, 9]])


def test_nothing_brings_back_what_a_grammar_forbids() -> None:
    raw = torch.zeros(1, 8)
    params = SamplingParams(
        temperature=0, logit_bias=((5, 100.0),), min_tokens=3, stop_token_ids=(1,), repetition_penalty=0.1
    )
    drawn = sample(raw, [Row(params, (5,), (), bytes([1 << 2 | 1 << 1]))])
    assert drawn.token_ids == [2] and not drawn.bad[0]
    assert sample(raw, [Row(params, (5,), (), bytes([1 << 1]))]).token_ids == [1]  # nothing else is left
    assert sample(raw, [Row(params, (5,), (), bytes([0]))]).bad == [True]


def test_a_number_that_is_not_finite_is_seen_behind_the_mask() -> None:
    raw = torch.zeros(2, 8)
    raw[0, 7], raw[1, 7] = torch.nan, torch.inf
    assert sample(raw, [Row(SamplingParams(), (), (), bytes([1]))] * 2).bad == [True, True]


def test_every_output_that_stops_matches(make_engine: MakeEngine) -> None:
    engine = make_engine()
    told = play(engine, *(asked(f"{i}", grammar) for i in range(8) for grammar in GRAMMARS[i % 4 : i % 4 + 1]))
    for i in range(8):
        ids, finish = told[f"{i}"]
        text = TOKENIZER.decode(ids)
        if finish == STOP:
            fits = [re.fullmatch("[a-c]{2,4}", text), text, re.fullmatch("(no)*yes", text), text][i % 4]
            assert fits
            assert i % 2 == 0 or isinstance(json.loads(text), list | dict)
        else:
            assert finish == LENGTH
    assert sum(finish == STOP for _, finish in told.values()) >= 4


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5, "num_logprobs": 2}])
def test_a_mixed_batch_gives_everyone_what_it_would_get_alone(make_engine: MakeEngine, how: dict[str, Any]) -> None:
    decoder = random_decoder(TINY)
    requests = [asked(f"{i}", grammar, **how) for i, grammar in enumerate(GRAMMARS * 2)]
    alone = {key: value for request in requests for key, value in play(make_engine(decoder), request).items()}
    assert play(make_engine(decoder), *requests) == alone
    free = [request for request in requests if request.grammar is None]
    assert play(make_engine(decoder), *free).items() <= alone.items()


@pytest.mark.parametrize("grammar", GRAMMARS[:4])
def test_taken_over_anywhere_it_goes_on_and_ends_the_same(make_engine: MakeEngine, grammar: Grammar) -> None:
    request = asked("a", grammar, max_tokens=20, stop_token_ids=(EOS,), eos_ids=(EOS,))
    ((ids, finish),) = play(make_engine(), request).values()
    for cut in range(len(ids) + 1):
        ((rest, end),) = play(make_engine(), request, so_far=ids[:cut]).values()
        assert ([*ids[:cut], *rest], end) == (ids, finish)


def test_preempted_it_goes_on_where_it_was(make_engine: MakeEngine) -> None:
    requests = [asked(f"{i}", Grammar("json_object"), "Once upon", max_tokens=60) for i in range(6)]
    unbroken = play(make_engine(), *requests)
    tight = make_engine(num_blocks=9)
    assert play(tight, *requests) == unbroken
    assert tight.stats().preemptions_total > 0


def test_min_tokens_keeps_the_end_away_as_long_as_there_is_something_else(make_engine: MakeEngine) -> None:
    ends: dict[str, Any] = {"stop_token_ids": (EOS,), "eos_ids": (EOS,), "logit_bias": ((EOS, 100.0),)}
    short = play(make_engine(), asked("a", Grammar("regex", "[a-c]*"), **ends))["a"]
    assert short == ([EOS], STOP)
    ids, finish = play(make_engine(), asked("a", Grammar("regex", "[a-c]*"), min_tokens=5, **ends))["a"]
    assert (len(ids), ids[-1], finish) == (6, EOS, STOP)
    ids, finish = play(make_engine(), asked("a", WORD, min_tokens=20, **ends))["a"]
    assert (len(ids), finish) == (4, STOP)  # the grammar has no more to say


def test_without_the_end_of_sequence_it_goes_on_as_far_as_the_grammar_does(make_engine: MakeEngine) -> None:
    """`ignore_eos` reaches the engine as no stop ids."""
    ids, finish = play(make_engine(), asked("a", Grammar("regex", "[a-c]*")))["a"]
    assert (len(ids), finish) == (40, LENGTH)
    ids, finish = play(make_engine(), asked("a", WORD))["a"]
    assert (len(ids), finish) == (4, STOP)


def test_complete_with_the_last_token_that_there_may_be_is_complete(make_engine: MakeEngine) -> None:
    assert play(make_engine(), asked("a", Grammar("regex", "[a-c]{4}"), max_tokens=4))["a"][1] == STOP
    assert play(make_engine(), asked("a", Grammar("regex", "[a-c]{5}"), max_tokens=4))["a"][1] == LENGTH


def test_a_grammar_of_the_empty_text_ends_before_the_first_token(make_engine: MakeEngine) -> None:
    assert play(make_engine(), asked("a", Grammar("regex", "()")))["a"] == ([], STOP)


def test_a_long_text_of_bounded_length_is_not_too_complex(make_engine: MakeEngine) -> None:
    bounded = of_schema({"type": "string", "minLength": 400, "maxLength": 4000})
    assert play(make_engine(), asked("a", bounded, max_tokens=300))["a"][1] == LENGTH


def test_stop_strings_and_stop_ids_cut_as_ever(make_engine: MakeEngine) -> None:
    """Whoever gives them wants less than the grammar's whole."""
    ids, finish = play(make_engine(), asked("a", Grammar("regex", "[a-c]{9}b"), stop=("b",)))["a"]
    assert finish == Finish(FinishReason.STOP, stop_reason="b") and ids[-1] == ID_OF[ord("b")]
    ids, finish = play(make_engine(), asked("a", Grammar("regex", "[a-c]{9}b"), stop_token_ids=(ID_OF[ord("b")],)))["a"]
    assert finish == Finish(FinishReason.STOP, stop_reason=ID_OF[ord("b")])


@pytest.mark.parametrize(
    "bad", [Grammar("lark", "start: nothing"), Grammar("regex", "(?=a)"), Grammar("json_schema", "{")]
)
def test_a_grammar_that_came_past_the_door_ends_its_own_request_only(make_engine: MakeEngine, bad: Grammar) -> None:
    told = play(make_engine(), asked("bad", bad), asked("good", WORD), asked("free", None))
    ids, finish = told["bad"]
    assert (ids, finish.reason) == ([], FinishReason.ERROR)
    assert told["good"][1] == STOP and told["free"][1] == LENGTH


def test_a_grammar_that_grows_too_complex_ends_its_own_request_only(make_engine: MakeEngine) -> None:
    hard = Grammar("lark", "start: T\nT: ~(~(~/(.|\\n)*a.{30}/ & /.{100}/))")
    told = play(make_engine(), asked("hard", hard, max_tokens=400), asked("good", WORD))
    _, finish = told["hard"]
    assert finish.reason is FinishReason.ERROR and "grammar" in (finish.error or "")
    assert told["good"][1] == STOP


def test_cancelled_before_it_is_compiled_no_more_is_said(make_engine: MakeEngine) -> None:
    engine = make_engine()
    room = engine.room()
    engine.add(asked("a", LIST))
    assert engine.has_work() and engine.room() == room - 1 and engine.stats().num_waiting == 1
    engine.cancel("a")
    assert not engine.has_work() and engine.room() == room
    assert play(engine, asked("a", WORD))["a"][1] == STOP


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    yield Grammars(lambda byte: bytes([byte]), 256, (), 256)


def test_the_latest_compiled_grammars_are_kept(grammars: Grammars) -> None:
    for i in range(MAX_KEPT + 5):
        grammars.begin(f"{i}", Grammar("regex", f"a{{{i}}}"), (), ())
    taken = 0
    while taken < MAX_KEPT + 5:
        taken += len(grammars.take(wait_s=5))
    assert len(grammars._kept) == MAX_KEPT
