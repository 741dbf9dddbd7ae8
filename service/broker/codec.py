"""The bytes of a broker: requests and log entries as msgpack, the same for every broker.

Owns the wire format and nothing else; it knows no queue, no network and no worker. Every value is an array that starts
with a version. A request is a map by field name: a field this program does not know, and a version it does not speak,
are refused, never skipped, while a missing field takes its default. Entries are written once per token and therefore
positional; their last part is there only where it says something, as in an older program's there is none. Redis's
functions write terminal entries too: they have no null, so false stands for it there. The format:
https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from dataclasses import fields
from typing import Any

import msgpack

from model.request import Delta, Finish, FinishReason, Grammar, Request, SamplingParams, TextOptions, TokenLogprob
from service.broker.base import Entry
from service.errors import MillraceError

VERSION = 1


class CodecError(MillraceError):
    """Bytes that this program can't read: written by another version, or not by us."""

    code = "unreadable_record"


def encode_request(request: Request) -> bytes:
    body = _as_map(request)
    if not request.cache_salt:
        del body["cache_salt"]  # a program that does not know it reads what does not need it
    if request.sampling.beam_width == 1:
        sampling = _as_map(request.sampling)
        del sampling["beam_width"], sampling["length_penalty"]
        body["sampling"] = sampling
    if not request.source_ids:
        del body["source_ids"]
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
    cached = (delta.num_cached,) if delta.num_cached else ()
    return _pack((VERSION, delta.start, delta.token_ids, logprobs, finish, *cached))


def decode_entry(raw: bytes) -> Entry:
    """What a reader gets of it, but for the timings. Raises `CodecError`."""
    start, token_ids, logprobs, finish, *cached = _body(raw, (4, 5))
    try:
        return Entry(
            start,
            tuple(token_ids),
            tuple(TokenLogprob(*item) for item in logprobs) if logprobs else (),
            None
            if finish is None
            else Finish(FinishReason(finish[0]), *(v if v is not False else None for v in finish[1:])),
            num_cached=int(*cached),
        )
    except (TypeError, ValueError, IndexError) as error:
        raise CodecError(f"a stored entry does not fit version {VERSION}: {error}") from error


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, default=_as_map)
    return packed


def _as_map(value: Any) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _body(raw: bytes, sizes: tuple[int, ...]) -> Any:
    """What follows the version. Arrays come back as tuples, as our frozen values have them."""
    try:
        version, *body = msgpack.unpackb(raw, use_list=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(raw)} stored bytes are not a record: {error}") from error
    if version != VERSION or len(body) not in sizes:
        raise CodecError(
            f"a record of version {version!r} with {len(body)} parts; this program reads version {VERSION}"
        )
    return body
