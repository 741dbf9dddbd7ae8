"""The bytes of a broker: requests and log entries as msgpack, the same for every broker.

Owns the wire format and nothing else; it knows no queue, no network and no worker. Every value is an array that starts
with a version. A request is a map by field name: a field this program does not know, and a version it does not speak,
are refused, never skipped, while a missing field takes its default. Entries are written once per token and therefore
positional; their last parts are there only where they say something, as in an older program's there are none. Redis's
functions write terminal entries too: they have no null, so false stands for it there. Their reader knows no binary type
either, so a result's bytes go as a string, with bytes that are no UTF-8 as they are. The format:
https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from dataclasses import fields
from typing import Any

import msgpack

from model.request import Delta, Finish, FinishReason, Grammar, Request, SamplingParams, TextOptions, TokenLogprob
from service.broker.base import Entry
from service.errors import MillraceError

VERSION = 1
# Fields that came after the first programs, with what they are where nobody asks for them.
LATER = {"cache_salt": "", "source_ids": (), "task": "generate", "pooling": ""}
RAW = "surrogateescape"


class CodecError(MillraceError):
    """Bytes that this program can't read: written by another version, or not by us."""

    code = "unreadable_record"


def encode_request(request: Request) -> bytes:
    body = _as_map(request)
    for name, usual in LATER.items():
        if body[name] == usual:
            del body[name]  # a program that does not know it reads what does not need it
    if (request.sampling.beam_width, request.sampling.length_penalty) == (1, 1.0):
        sampling = _as_map(request.sampling)
        del sampling["beam_width"], sampling["length_penalty"]
        body["sampling"] = sampling
    return _pack((VERSION, body))


def decode_request(raw: bytes) -> Request:
    """The request exactly as encoded. Raises `CodecError`."""
    (body,) = _body(raw, (1,))
    try:
        sampling, text = SamplingParams(**body["sampling"]), TextOptions(**body["text"])
        grammar = Grammar(**body["grammar"]) if body.get("grammar") else None
        return Request(**{**body, "sampling": sampling, "text": text, "grammar": grammar})
    except (TypeError, KeyError) as error:
        raise CodecError(f"a stored request does not fit version {VERSION}: {error}") from error


def encode_entry(delta: Delta) -> bytes:
    """A worker's delta as the log keeps it: the id is the log's."""
    logprobs = [(item.logprob, item.top) for item in delta.logprobs] if delta.logprobs else ()
    end = delta.finish
    finish = None if end is None else (end.reason, end.stop_reason, end.error)
    tail: tuple[object, ...] = (delta.num_cached,) if delta.num_cached or delta.result else ()
    tail += (delta.result.decode(errors=RAW),) if delta.result else ()
    return _pack((VERSION, delta.start, delta.token_ids, logprobs, finish, *tail), RAW)


def decode_entry(raw: bytes) -> Entry:
    """What a reader gets of it, but for the timings. Raises `CodecError`."""
    start, token_ids, logprobs, finish, *tail = _body(raw, (4, 5, 6), RAW)
    try:
        return Entry(
            start,
            tuple(token_ids),
            tuple(TokenLogprob(*item) for item in logprobs) if logprobs else (),
            None
            if finish is None
            else Finish(FinishReason(finish[0]), *(v if v is not False else None for v in finish[1:])),
            num_cached=int(*tail[:1]),
            result=str(*tail[1:]).encode(errors=RAW),
        )
    except (TypeError, ValueError, IndexError) as error:
        raise CodecError(f"a stored entry does not fit version {VERSION}: {error}") from error


def _pack(value: object, errors: str = "strict") -> bytes:
    packed: bytes = msgpack.packb(value, default=_as_map, unicode_errors=errors)
    return packed


def _as_map(value: Any) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _body(raw: bytes, sizes: tuple[int, ...], errors: str = "strict") -> Any:
    """What follows the version. Arrays come back as tuples, as our frozen values have them."""
    try:
        version, *body = msgpack.unpackb(raw, use_list=False, unicode_errors=errors)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(raw)} stored bytes are not a record: {error}") from error
    if version != VERSION or len(body) not in sizes:
        raise CodecError(
            f"a record of version {version!r} with {len(body)} parts; this program reads version {VERSION}"
        )
    return body
