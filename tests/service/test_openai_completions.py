"""`/v1/completions`: prompts of every form, log-probabilities in its own shape, and what is refused; and the models."""

import json
from typing import Any

import pytest

from model.request import TokenLogprob
from service.broker.base import Entry
from tests.service.helpers_http import STOP, TIMINGS, Door, say
from tests.service.helpers_openai import OpenAIDoor, chunks_of, said


async def test_a_prompt_is_continued_whole_and_streamed() -> None:
    answer = (await OpenAIDoor().complete()).json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello", "stop", None)
    chunks = chunks_of(await OpenAIDoor().complete(stream=True))
    assert said(chunks) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]


@pytest.mark.parametrize(
    "prompt, lengths",
    [("hi", [2]), ([1, 2, 3], [3]), (["a", "bc"], [1, 2]), ([[1], [2, 3]], [1, 2]), (["abc"], [3])],
)
async def test_prompts_are_text_or_ids_one_or_several(prompt: object, lengths: list[int]) -> None:
    door = OpenAIDoor()
    answer = (await door.complete(prompt, n=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(lengths)))
    assert [len(request.prompt_ids) for request in door.broker.requests] == [n for n in lengths for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)


async def test_the_fields_of_both_routes_reach_the_request() -> None:
    door = OpenAIDoor()
    fields: dict[str, Any] = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True}
    fields |= {"stop_token_ids": [7], "priority": -1, "timeout_s": 5, "logit_bias": {"5": -100}, "stop": "x"}
    fields |= {
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "temperature": 0,
        "top_p": 0.5,
        "user": "u",
        "best_of": 1,
    }
    assert (await door.complete(**fields, stream_options=None)).status_code == 200
    (request,) = door.broker.requests
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (3, 0.1, 1.5, 2)
    assert (sampling.stop_token_ids, sampling.logit_bias, request.priority) == ((7,), ((5, -100.0),), -1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.max_tokens) == (1, -1, 16)
    assert request.deadline_s == request.created_s + 5 and request.text.stop == ("x",)


async def test_log_probabilities_are_parallel_lists_of_what_is_in_the_text() -> None:
    end = Entry(1, (0,), (TokenLogprob(-0.1),), finish=STOP, timings=TIMINGS)
    script = [Entry(0, (65,), (TokenLogprob(-0.5, ((66, -0.2), (65, float("-inf")))),)), end]
    answer = (await OpenAIDoor(lambda request: script).complete(logprobs=2)).json()
    told = answer["choices"][0]["logprobs"]
    assert [len(values) for values in told.values()] == [1, 1, 1, 1]
    assert told["token_logprobs"] == [-0.5] and sorted(told["top_logprobs"][0].values()) == [-9999.0, -0.2]


async def test_an_echo_begins_the_text() -> None:
    assert (await OpenAIDoor().complete("oh, ", echo=True)).json()["choices"][0]["text"] == "oh, hello"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2, "n": 1}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
async def test_a_field_that_is_wrong_or_not_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    response = await OpenAIDoor().ask("POST", "/v1/completions", json={"prompt": "hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_neutral_values_of_what_is_not_honoured_change_nothing() -> None:
    response = await OpenAIDoor().complete(
        suffix="", use_beam_search=False, length_penalty=1.0, skip_special_tokens=True
    )
    assert response.status_code == 200 and "x-millrace-ignored" not in response.headers


async def test_a_token_without_text_makes_no_chunk() -> None:
    two_bytes = "hé?"
    assert len(chunks_of(await OpenAIDoor(say(two_bytes)).complete(stream=True))) == 4


async def test_a_key_gives_the_same_answer_again_whatever_else_is_in_the_body() -> None:
    door, key = OpenAIDoor(), {"Idempotency-Key": "k"}
    body = {"prompt": "hi", "vendor": {"a": [None, 1.5]}}
    first, second = [await door.ask("POST", "/v1/completions", json=body, headers=key) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"] and len(door.broker.requests) == 1


async def test_the_model_is_listed_and_found_by_its_name() -> None:
    listed = (await Door().ask("GET", "/v1/models")).json()
    assert listed["object"] == "list" and listed["data"][0]["max_model_len"] == 64
    assert (await Door().ask("GET", "/v1/models/tiny")).json() == listed["data"][0]
    assert (await Door().ask("HEAD", "/v1/models/tiny")).status_code == 200
    missing = await Door().ask("GET", "/v1/models/no/such")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_bodies_are_described_whole() -> None:
    paths = Door().app.openapi()["paths"]
    assert '"#/$defs/' not in json.dumps(paths)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "tools", "top_k", "seed"} <= body["properties"].keys() and body["required"] == ["messages"]
