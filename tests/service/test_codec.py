"""What is written can be read again exactly, and what can't be read is refused."""

from types import GenericAlias
from typing import Any, get_args, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.request import Delta, Finish, FinishReason, Grammar, Request, SamplingParams, TextOptions, TokenLogprob
from service.broker.base import Entry
from service.broker.codec import VERSION, CodecError, decode_entry, decode_request, encode_entry, encode_request

INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)


def every_field_of(cls: type, strategies: dict[Any, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Values with every field drawn, by its type: a new field is covered, or fails here."""
    return st.builds(cls, **{name: strategies[hint] for name, hint in get_type_hints(cls).items()})


def strategies() -> dict[Any, st.SearchStrategy[Any]]:
    simple: dict[Any, st.SearchStrategy[Any]] = {int: INTS, float: FLOATS, str: TEXT, bool: st.booleans()}
    simple[bytes] = st.binary(max_size=40)
    known = simple | {hint | None: st.none() | drawn for hint, drawn in simple.items()}
    known |= {str | int | None: st.none() | TEXT | INTS, FinishReason: st.sampled_from(FinishReason)}
    known |= {
        GenericAlias(tuple, (hint, ...)): st.lists(drawn, max_size=4).map(tuple) for hint, drawn in simple.items()
    }
    known[tuple[tuple[int, float], ...]] = st.lists(st.tuples(INTS, FLOATS), max_size=3).map(tuple)
    for holder, name in ((Grammar, "kind"), (Request, "task"), (Request, "pooling")):
        hint = get_type_hints(holder)[name]
        known[hint] = st.sampled_from(get_args(hint))
    for cls in (SamplingParams, TextOptions, TokenLogprob, Finish, Grammar):
        known[cls] = every_field_of(cls, known)
    known[Grammar | None] = st.none() | known[Grammar]
    known[Finish | None] = st.none() | known[Finish]
    known[tuple[TokenLogprob, ...]] = st.lists(known[TokenLogprob], max_size=3).map(tuple)
    return known


@given(every_field_of(Request, strategies()))
def test_a_request_comes_back_as_it_was(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


def test_a_length_penalty_without_beams_comes_back_too() -> None:
    request = Request("a", (1,), SamplingParams(length_penalty=0.5))
    assert decode_request(encode_request(request)) == request


@given(every_field_of(Delta, strategies()))
def test_a_delta_becomes_an_entry_with_all_it_said(delta: Delta) -> None:
    entry = decode_entry(encode_entry(delta))
    told = (delta.start, delta.token_ids, delta.logprobs, delta.finish, None, delta.num_cached, delta.result)
    assert entry == Entry(*told)
    assert entry.finish is None or type(entry.finish.reason) is FinishReason


@given(st.binary(max_size=40))
def test_bytes_of_others_are_refused(raw: bytes) -> None:
    for decode in (decode_request, decode_entry):
        with pytest.raises(CodecError):
            decode(raw)


def test_another_version_and_an_unknown_field_are_refused_by_name() -> None:
    version, body = msgpack.unpackb(encode_request(Request("a", (1,))))
    with pytest.raises(CodecError, match=f"version {VERSION + 1}"):
        decode_request(msgpack.packb((VERSION + 1, body)))
    with pytest.raises(CodecError, match="colour"):
        decode_request(msgpack.packb((version, body | {"colour": 1})))


def test_what_an_older_program_wrote_is_read_and_what_it_can_read_is_written_so() -> None:
    finish = Finish(FinishReason.STOP)
    old = msgpack.packb((1, 3, (7,), (), ("stop", None, None)))
    assert decode_entry(old) == Entry(3, (7,), finish=finish)
    assert encode_entry(Delta("a", 3, (7,), finish=finish)) == old
    assert decode_entry(encode_entry(Delta("a", 3, (7,), finish=finish, num_cached=5))).num_cached == 5
    plain = msgpack.unpackb(encode_request(Request("a", (1,))))[1]
    later = {"cache_salt", "source_ids", "task", "pooling", "beam_width", "length_penalty"}
    assert not later & (plain.keys() | plain["sampling"].keys())


@pytest.mark.parametrize(
    "request_", [Request("a", (0,), source_ids=(5, 6)), Request("a", (1,), SamplingParams(beam_width=4))]
)
def test_what_only_newer_programs_know_is_told_and_comes_back(request_: Request) -> None:
    """An older one refuses it as an unknown field; it must not answer something else."""
    assert decode_request(encode_request(request_)) == request_
    version, body = msgpack.unpackb(encode_request(request_))
    with pytest.raises(CodecError, match="unknown_of_tomorrow"):
        decode_request(msgpack.packb((version, {**body, "unknown_of_tomorrow": 1})))


def test_a_field_that_an_older_program_did_not_write_takes_its_default() -> None:
    version, body = msgpack.unpackb(encode_request(Request("a", (1,), priority=3)))
    del body["priority"]
    assert decode_request(msgpack.packb((version, body))) == Request("a", (1,), priority=0)
