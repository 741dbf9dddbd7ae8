"""`/v1/embeddings` and `/classify` over a broker that plays results: fields, shapes, refusals."""

import base64
import struct
from dataclasses import replace
from typing import Any

import pytest

from model.request import Finish, FinishReason, Request
from service.broker.base import Entry
from tests.service.helpers_broker import STOP
from tests.service.helpers_http import SERVED, TOKENIZER, Door, Script

SIZE = 3
ENCODER = replace(SERVED, tasks=("embed", "classify"), labels=("bad", "good"), hidden_size=SIZE, pooling="mean")
DECODER = replace(SERVED, hidden_size=SIZE)
FAILED = Finish(FinishReason.ERROR, error="the network produced a number that is not finite")


def vector(request: Request) -> bytes:
    """Says which text it is of."""
    return struct.pack("<3f", len(request.prompt_ids), 0.5, -0.25)


def told(request: Request) -> list[Any]:
    result = vector(request) if request.task == "embed" else struct.pack("<2f", 0.25, 0.75)
    return [Entry(0, finish=STOP, result=result)]


def door(served: Any = ENCODER, script: Script = told) -> Door:
    made = Door(script)
    made.backend.loaded(served, made.broker)
    return made


async def embed(made: Door, given: object, **fields: object) -> Any:
    return await made.ask("POST", "/v1/embeddings", json={"model": "tiny", "input": given, **fields})


@pytest.mark.parametrize(
    ("given", "lengths"), [("hello", [5]), (["a", "bcd"], [1, 3]), ([7, 8], [2]), ([[7], [8, 9]], [1, 2])]
)
async def test_texts_and_ids_alone_and_in_batches_become_vectors(given: object, lengths: list[int]) -> None:
    made = door()
    answer = (await embed(made, given)).json()
    assert [item["embedding"] for item in answer["data"]] == [[length, 0.5, -0.25] for length in lengths]
    assert [item["index"] for item in answer["data"]] == list(range(len(lengths)))
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert {(r.task, r.pooling, r.sampling.max_tokens) for r in made.broker.requests} == {("embed", "mean", 0)}
    assert made.books() == {"accepted": len(lengths), "in_flight": 0, "stop": len(lengths)}


async def test_base64_is_the_bytes_themselves() -> None:
    made = door()
    [item] = (await embed(made, "hello", encoding_format="base64")).json()["data"]
    assert base64.b64decode(item["embedding"]) == vector(made.broker.requests[0])


async def test_labels_come_with_their_probabilities() -> None:
    answer = await door().ask("POST", "/classify", json={"input": ["hello", "you"], "priority": -1})
    expected = {"label": "good", "probabilities": {"bad": 0.25, "good": 0.75}}
    assert answer.json()["data"] == [{"index": 0, **expected}, {"index": 1, **expected}]
    assert answer.json()["usage"] == {"prompt_tokens": 8, "total_tokens": 8}


async def test_a_whole_context_may_be_read_and_no_more() -> None:
    made = door()
    assert (await embed(made, [1] * 64)).status_code == 200
    refused = await embed(made, ["fine", "x" * 65])
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert len(made.broker.requests) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [256]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"pooling": "max"}, "pooling"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    refused = await door().ask("POST", "/v1/embeddings", json={"input": "hello", **fields})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


async def test_the_models_own_number_of_dimensions_is_taken_and_fields_of_others_are_named() -> None:
    answer = await embed(door(), "hello", dimensions=SIZE, user="ada", truncate=True)
    assert answer.status_code == 200 and answer.headers["x-millrace-ignored"] == "truncate"


@pytest.mark.parametrize(
    ("served", "path", "body"),
    [(DECODER, "/classify", {"input": "a"}), (ENCODER, "/generate", {"prompt": "a"}),
     (ENCODER, "/v1/completions", {"model": "tiny", "prompt": "a"})],
)  # fmt: skip
async def test_a_model_that_cannot_do_it_says_so(served: Any, path: str, body: dict[str, object]) -> None:
    refused = await door(served).ask("POST", path, json=body)
    assert refused.status_code == 400 and "can't" in refused.text and "task_not_supported" in refused.text


async def test_a_decoder_pools_its_last_token_and_never_its_first() -> None:
    made = door(DECODER)
    await embed(made, "hello")
    await embed(made, "hello", pooling="mean")
    assert [request.pooling for request in made.broker.requests] == ["last", "mean"]
    assert (await embed(made, "hello", pooling="cls")).status_code == 400


async def test_one_text_that_failed_fails_them_all() -> None:
    def script(request: Request) -> list[Any]:
        return [Entry(0, finish=FAILED)] if request.prompt_ids == tuple(TOKENIZER.encode("bad")) else told(request)

    refused = await embed(door(script=script), ["good", "bad"])
    assert refused.status_code == 500 and "not finite" in refused.json()["error"]["message"]


async def test_a_full_queue_is_a_429() -> None:
    made = door()
    made.broker.full = True
    assert (await embed(made, "hello")).status_code == 429
    assert (await made.ask("POST", "/classify", json={"input": "hello"})).status_code == 429


async def test_a_key_gives_the_same_answer_again_but_not_to_another_route() -> None:
    made, key = door(), {"Idempotency-Key": "k"}
    first, again = [await made.ask("POST", "/v1/embeddings", json={"input": "hello"}, headers=key) for _ in range(2)]
    assert first.json() == again.json() and len(made.broker.requests) == 1
    assert (await made.ask("POST", "/classify", json={"input": "hello"}, headers=key)).status_code == 409


async def test_what_has_no_text_cannot_be_read_as_one() -> None:
    made = door()
    await embed(made, "hello")
    assert (await made.read()).status_code == 404
