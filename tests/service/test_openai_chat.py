"""`/v1/chat/completions` over a broker that plays a script: fields in, shapes out, and how it ends."""

from typing import Any

import pytest

from model.request import Finish, FinishReason, TokenLogprob
from service.broker.base import Entry
from service.errors import Handover
from tests.service.helpers_http import LENGTH, TIMINGS, say
from tests.service.helpers_openai import HI, OpenAIDoor, chunks_of, said


async def test_a_chat_is_answered_whole() -> None:
    door = OpenAIDoor()
    answer = (await door.chat(seed=3, model="tiny")).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    (request,) = door.broker.requests
    assert bytes(request.prompt_ids) != b"" and len(request.prompt_ids) == len("u:hi|")
    assert (request.sampling.seed, request.sampling.max_tokens) == (3, 59)  # all the room there is


async def test_the_role_comes_with_the_first_token_and_the_reason_in_a_chunk_of_its_own() -> None:
    chunks = chunks_of(await OpenAIDoor().chat(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "h"},
        *({"content": letter} for letter in "ello"),
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_at_the_end_if_asked_for_and_with_every_chunk_if_asked_for() -> None:
    chunks = chunks_of(await OpenAIDoor().chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(await OpenAIDoor().chat(stream=True, stream_options=options))
    assert [chunk["usage"]["total_tokens"] for chunk in chunks] == [6, 7, 8, 9, 10, 10, 10]


async def test_what_was_found_in_the_cache_is_told_in_whole_answers_and_streams() -> None:
    door = OpenAIDoor(say("hello", num_cached=3))
    assert (await door.chat(cache_salt="s")).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert door.broker.requests[0].cache_salt == "s"
    chunks = chunks_of(await door.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_what_was_held_back_comes_before_the_reason() -> None:
    chunks = chunks_of(await OpenAIDoor(say("hello", LENGTH)).chat(stream=True, stop=["lox"]))
    assert said(chunks) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]


BAD_ENDS = [
    (Finish(FinishReason.TIMEOUT, stop_reason="timeout_s"), 504, "timeout"),
    (Finish(FinishReason.CANCELLED), 499, "cancelled"),
    (Finish(FinishReason.ERROR, error="the engine failed"), 500, "internal_error"),
]


@pytest.mark.parametrize("finish, status, code", BAD_ENDS)
async def test_what_openai_has_no_reason_for_is_an_error(finish: Finish, status: int, code: str) -> None:
    response = await OpenAIDoor(say("hel", finish)).chat()
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("x-should-retry") == ("false" if status == 504 else None)
    chunks = chunks_of(await OpenAIDoor(say("hel", finish)).chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].keys() == {"error"} and chunks[-1]["error"]["code"] == code
    assert not any("error" in chunk or chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])


async def test_a_server_that_stops_says_so() -> None:
    response = await OpenAIDoor(lambda request: [Handover()]).chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize("num_tokens", [0, 1])
async def test_a_stream_that_a_stopping_server_leaves_ends_as_an_error(num_tokens: int) -> None:
    door = OpenAIDoor(lambda request: [*[Entry(i, (65,)) for i in range(num_tokens)], Handover()])
    chunks = chunks_of(await door.chat(stream=True))
    assert [chunk.keys() == {"error"} for chunk in chunks] == [False] * num_tokens + [True]
    assert chunks[-1]["error"]["code"] == "unavailable"
    assert door.broker.cancelled == []


async def test_a_resumable_stream_that_a_stopping_server_leaves_just_ends() -> None:
    told = await OpenAIDoor(lambda request: [Entry(0, (65,)), Handover()]).chat(stream=True, resumable=True)
    assert "retry: 200" in told.text and "error" not in told.text and "[DONE]" not in told.text


async def test_log_probabilities_have_bytes_and_alternatives() -> None:
    end = Entry(1, (0,), (TokenLogprob(-0.1),), finish=Finish(FinishReason.STOP), timings=TIMINGS)
    script = [Entry(0, (65,), (TokenLogprob(-0.5, ((65, -0.5), (66, float("-inf")))),)), end]
    for stream in (False, True):
        response = await OpenAIDoor(lambda request: script).chat(logprobs=True, top_logprobs=2, stream=stream)
        choice = (chunks_of(response)[0] if stream else response.json())["choices"][0]
        (told,) = choice["logprobs"]["content"]  # the end of the sequence is no part of the answer
        assert (told["logprob"], len(told["bytes"])) == (-0.5, 1)
        assert [top["logprob"] for top in told["top_logprobs"]] == [-0.5, -9999.0]


async def test_several_choices_have_a_role_and_a_reason_each() -> None:
    chunks = chunks_of(await OpenAIDoor().chat(stream=True, n=2))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert sorted(choice["index"] for choice in choices if "role" in choice["delta"]) == [0, 1]
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1]
    assert [choice["finish_reason"] for choice in choices[-2:]] == ["stop", "stop"]


async def test_fields_that_nobody_knows_are_passed_over_and_named() -> None:
    response = await OpenAIDoor().chat(store=True, metadata={"a": [1]}, nul=None, user="me", **{"é\n": 1})
    assert response.status_code == 200
    assert response.headers["x-millrace-ignored"] == "store, metadata, nul, %C3%A9%0A"
    assert "x-millrace-ignored" not in (await OpenAIDoor().chat(temperature=None, top_k=5)).headers


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache_salt": ""}, "cache_salt"),
    ({"functions": [{}]}, "functions"),
    ({"best_of": 2}, "best_of"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "user", "content": 3}]}, "messages[1].content"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"temperature": 3}, "temperature"),
    ({"n": 9}, "n"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"background": True}, "background"),
]


@pytest.mark.parametrize("fields, param", REFUSED)
async def test_a_field_that_is_wrong_or_not_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    response = await OpenAIDoor().ask("POST", "/v1/chat/completions", json={"messages": HI, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_a_conversation_that_is_too_long_says_how_long_in_numbers() -> None:
    door, long = OpenAIDoor(max_model_len=16), [{"role": "user", "content": "x" * 20}]
    error = (await door.chat(long)).json()["error"]
    assert (error["code"], error["n_prompt_tokens"], error["n_ctx"]) == ("context_length_exceeded", 23, 16)
    assert (await door.chat(long, on_overflow="truncate_left")).status_code == 200
    assert len(door.broker.requests[0].prompt_ids) == 8  # half of the context is left to the answer


async def test_a_stream_is_read_again_from_any_token_byte_for_byte_and_only_here() -> None:
    door = OpenAIDoor()
    options = {"include_usage": True, "continuous_usage_stats": True}
    first = await door.chat(stream=True, resumable=True, stream_options=options)
    url = first.headers["content-location"]
    assert url.startswith("/v1/chat/completions/chatcmpl-")
    again = await door.ask("GET", url, headers={"Last-Event-ID": f"{url.rpartition('/')[2]}:2"})
    assert first.text.endswith(again.text.removeprefix("retry: 1000\n")) and len(chunks_of(again)) == 5
    assert (await door.ask("GET", url, params={"stream": "false"})).json()["choices"][0]["message"][
        "content"
    ] == "hello"
    elsewhere = url.replace("/v1/chat/", "/v1/")
    assert (await door.ask("GET", elsewhere)).json()["error"]["code"] == "request_not_found"
    assert (await door.ask("DELETE", url)).status_code == 202
