"""`/v1/responses` over a broker that plays a script: fields in, the response whole, at once and cancelled."""

from typing import Any

import pytest

from model.request import Finish, FinishReason
from service.broker.base import CANCELLED, Entry
from tests.service.helpers_http import LENGTH, TOKENIZER, hang, say
from tests.service.helpers_responses import ResponsesDoor, text_of

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}


def prompt(door: ResponsesDoor) -> str:
    """What the last request asked the model, written by the template of `helpers_openai`."""
    return TOKENIZER.decode(door.broker.requests[-1].prompt_ids)


async def test_a_response_is_answered_whole() -> None:
    door = ResponsesDoor()
    answer = (await door.respond(seed=3, model="tiny", temperature=1.0, metadata={"a": "b"}, user="me")).json()
    id, (request,) = answer["id"], door.broker.requests
    assert id.startswith("resp_") and request.id == id and answer["created_at"] > 0
    (message,) = answer["output"]
    assert (message["role"], message["status"], text_of(answer)) == ("assistant", "completed", "hello")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "tiny")
    assert (answer["metadata"], answer["user"], answer["temperature"]) == ({"a": "b"}, "me", 1.0)
    assert {k: v for k, v in answer["usage"].items() if isinstance(v, int)} == {
        "input_tokens": 5,
        "output_tokens": 5,
        "total_tokens": 10,
    }
    assert (request.sampling.seed, request.sampling.max_tokens) == (3, 59)  # all the room there is


async def test_what_was_found_in_the_cache_is_told() -> None:
    door = ResponsesDoor(say("hello", num_cached=3))
    assert (await door.respond(cache_salt="s")).json()["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert door.broker.requests[0].cache_salt == "s"


async def test_items_become_the_turns_of_a_conversation() -> None:
    door = ResponsesDoor(max_model_len=200)
    answer = [{"type": "output_text", "text": "b", "annotations": []}]
    said = {"type": "message", "role": "assistant", "content": answer}
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}", "id": "fc_1"}
    output = {"type": "function_call_output", "call_id": "c", "output": "d"}
    parts = [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}]
    asked = [{"role": "user", "content": "a"}, said, call, call | {"call_id": "e"}, output]
    await door.respond([*asked, {"role": "developer", "content": parts}], instructions="be", tools=[TOOL])
    assert prompt(door) == "s:be|u:a|a:b|t:d|s:xy|1"
    answer = (await door.respond(tools=[TOOL], tool_choice="none")).json()
    assert prompt(door) == "u:hi|"
    assert (answer["tools"][0]["name"], answer["tool_choice"]) == ("look", "none")


async def test_what_bounds_the_answer_reaches_the_request() -> None:
    door = ResponsesDoor(say("hel", LENGTH))
    fields = {"max_output_tokens": 3, "top_p": 0.5, "top_k": 4, "timeout_s": 9, "stop": ["x"], "priority": -1}
    answer = (await door.respond(**fields)).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (answer["output"][0]["status"], text_of(answer)) == ("incomplete", "hel")
    request = door.broker.requests[0]
    assert (request.sampling.max_tokens, request.sampling.top_p, request.sampling.top_k) == (3, 0.5, 4)
    assert (request.text.stop, request.priority) == (("x",), -1)


async def test_an_input_that_is_too_long_is_refused_or_cut() -> None:
    door = ResponsesDoor()
    error = (await door.respond("x" * 100)).json()["error"]
    assert (error["code"], error["n_prompt_tokens"], error["n_ctx"]) == ("context_length_exceeded", 103, 64)
    assert (await door.respond("x" * 100, truncation="auto")).json()["truncation"] == "auto"
    assert len(door.broker.requests[0].prompt_ids) == 32  # half of the context is left to the answer


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "p"}},
        {"include": ["message.output_text.logprobs"]},
        {"reasoning": {"effort": "high"}},
        {"top_logprobs": 2},
        {"max_tokens": 3},
        {"n": 2},
        {"cache_salt": ""},
        {"input": []},
        {"input": [{"type": "input_image", "image_url": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": {"type": "function", "name": "none_such"}},
        {"text": {"verbosity": "high"}},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"metadata": {str(i): "" for i in range(17)}},
        {"metadata": {"k": "v" * 513}},
        {"background": True, "store": False},
        {"stream_options": {"include_obfuscation": False}},
        {"progress": True},
        {"max_output_tokens": 0},
        {"temperature": 3},
    ],
)
async def test_what_is_not_honoured_or_not_in_its_bounds_is_named(fields: dict[str, Any]) -> None:
    response = await ResponsesDoor().ask("POST", "/v1/responses", json={"input": "hi", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(next(iter(fields)))


async def test_what_changes_nothing_is_taken_and_what_is_unknown_is_listed() -> None:
    nothing = {"include": [], "reasoning": {"effort": "none"}, "n": 1, "parallel_tool_calls": True}
    assert "x-millrace-ignored" not in (await ResponsesDoor().respond(**nothing, previous_response_id=None)).headers
    response = await ResponsesDoor().respond(service_tier="auto", strange=1)
    assert response.headers["x-millrace-ignored"] == "service_tier, strange"


@pytest.mark.parametrize(
    "finish, status, code",
    [
        (Finish(FinishReason.TIMEOUT, stop_reason="timeout_s"), 504, "timeout"),
        (CANCELLED, 499, "cancelled"),
        (Finish(FinishReason.ERROR, error="the engine failed"), 500, "internal_error"),
    ],
)
async def test_what_comes_to_no_good_end_is_an_error_now_and_a_status_later(
    finish: Finish, status: int, code: str
) -> None:
    door = ResponsesDoor(say("hel", finish))
    response = await door.respond()
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    later = (await door.retrieve(door.broker.requests[0].id)).json()
    wanted = ("cancelled", None) if finish is CANCELLED else ("failed", "server_error")
    assert (later["status"], (later["error"] or {}).get("code")) == wanted
    assert (text_of(later), later["output"][0]["status"]) == ("hel", "incomplete")


async def test_in_the_background_it_is_answered_at_once_and_looked_at_in_every_state() -> None:
    door = ResponsesDoor(hang())
    queued = await door.respond(background=True)
    assert (queued.status_code, queued.json()["status"], queued.json()["output"]) == (200, "queued", [])
    id, door.broker.position = queued.json()["id"], 2
    assert (await door.retrieve(id)).json() == queued.json()
    door.broker.position, door.broker.script = None, hang(Entry(0, tuple(TOKENIZER.encode("he"))))
    running = (await ResponsesDoor(broker=door.broker).retrieve(id)).json()  # another process
    assert (running["status"], running["background"], text_of(running), running["usage"]) == (
        "in_progress",
        True,
        "he",
        None,
    )
    door.broker.script = say("hello")
    ended = (await door.retrieve(id, stream="false")).json()
    assert (ended["status"], text_of(ended)) == ("completed", "hello")
    assert door.books()["handed_over"] == 1 and not door.broker.cancelled


async def test_cancelling_tells_how_it_ends() -> None:
    door = ResponsesDoor(hang(Entry(0, (104,))))
    id = (await door.respond(background=True)).json()["id"]
    cancelled = await door.cancel(id)
    assert (cancelled.status_code, cancelled.json()["status"], door.broker.cancelled) == (200, "cancelled", [id])
    door.broker.script = say("hello")
    assert (await door.cancel(id)).json()["status"] == "completed"  # it had ended before


async def test_only_what_was_made_here_and_stored_can_be_read() -> None:
    door = ResponsesDoor()
    chat = (await door.chat()).json()["id"]
    unstored = (await door.respond(store=False)).json()["id"]
    for id in (chat, unstored, "resp_0"):
        for params in ({}, {"stream": "true"}):
            assert (await door.retrieve(id, **params)).status_code == 404
    assert (await door.cancel(chat)).status_code == 404


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "01", "9" * 12])
async def test_a_number_to_start_after_is_one(after: str) -> None:
    door = ResponsesDoor()
    id = (await door.respond()).json()["id"]
    for params in ({"stream": "true", "starting_after": after}, {"starting_after": "3"}):
        response = await door.retrieve(id, **params)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "starting_after")
