"""The events of `/v1/responses`: their order and numbers, the same ones again from any of them on, and tool calls."""

import json
from typing import Any

import pytest

from model.request import Finish, FinishReason
from service.broker.base import CANCELLED, Entry
from tests.service.helpers_http import LENGTH, Script, hang, say
from tests.service.helpers_responses import ResponsesDoor, events_of, text_of, told
from tests.service.test_http_resume import cut_by

TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}
CALL = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
TIMEOUT = Finish(FinishReason.TIMEOUT, stop_reason="timeout_s")
BEGIN = ["created", "in_progress", "output_item.added", "content_part.added"]
DONE = ["output_text.done", "content_part.done", "output_item.done"]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


async def test_events_come_in_order_and_add_up_to_the_response() -> None:
    door = ResponsesDoor()
    events = await door.events(instructions="be")
    assert kinds(events) == [*BEGIN, *["output_text.delta"] * 5, *DONE, "completed"]
    assert told(events) == "hello"
    assert [events[i]["response"]["status"] for i in (0, 1, -1)] == ["in_progress", "in_progress", "completed"]
    assert events[0]["response"]["instructions"] == "be" and events[0]["response"]["output"] == []
    final = events[-1]["response"]
    assert (text_of(final), final["usage"]["output_tokens"]) == ("hello", 5)
    assert final == (await door.retrieve(final["id"])).json()
    assert {event["item_id"] for event in events if "item_id" in event} == {final["output"][0]["id"]}


async def test_there_is_no_done_line_and_the_first_events_come_before_any_token() -> None:
    door = ResponsesDoor()
    assert "[DONE]" not in (await door.respond(stream=True)).text
    door.broker.script = lambda request: [RuntimeError("broken")]
    assert kinds(await door.events()) == ["created", "in_progress", "failed"]


@pytest.mark.parametrize(
    "script, fields, end",
    [
        (say("hello", LENGTH), {}, [*DONE, "incomplete"]),
        (say("hello", LENGTH), {"stop": ["lox"]}, ["output_text.delta", *DONE, "incomplete"]),
        (say("hello", TIMEOUT), {}, ["failed"]),
        (say("hello", CANCELLED), {}, ["failed"]),
        (say("hello"), {"stop": ["ell"]}, [*DONE, "completed"]),
    ],
)
async def test_every_end_is_told_once(script: Script, fields: dict[str, Any], end: list[str]) -> None:
    events = await ResponsesDoor(script).events(**fields)
    assert kinds(events)[-len(end) :] == end
    final = events[-1]["response"]
    assert text_of(final) == told(events) == ("h" if fields.get("stop") == ["ell"] else "hello")
    assert (final["error"] is None) == ((script is not None and end != ["failed"]) or final["status"] == "cancelled")


async def test_an_answer_of_nothing_has_an_empty_message() -> None:
    door = ResponsesDoor(lambda request: [Entry(0, (0,), finish=Finish(FinishReason.STOP))])
    events = await door.events()
    assert kinds(events) == [*BEGIN, *DONE, "completed"]
    final = events[-1]["response"]
    assert final["output"] == (await door.retrieve(final["id"])).json()["output"] != []


TEXTS: dict[str, tuple[str, Finish, dict[str, Any]]] = {
    "plain": ("hello", LENGTH, {}),
    "a character of several tokens": ("h\u00e9l\u20aco", LENGTH, {}),
    "held back": ("ab EN", LENGTH, {"stop": ["END"]}),
    "a stop string": ("ab END", Finish(FinishReason.STOP, "END"), {"stop": ["END"]}),
    "a failure": ("ab", Finish(FinishReason.ERROR, error="the engine failed"), {}),
    "nothing": ("", TIMEOUT, {}),
    "calls": (f"so {CALL}{CALL} and", Finish(FinishReason.STOP), {"tools": [TOOL]}),
}


@pytest.mark.parametrize("kind", TEXTS)
async def test_after_any_number_the_same_events_come_again(kind: str) -> None:
    text, finish, fields = TEXTS[kind]
    door = ResponsesDoor(cut_by(*[1] * 200, text=text, end=finish), max_model_len=400)
    original = await door.events(**fields)
    id, other = door.broker.requests[0].id, ResponsesDoor(broker=door.broker, max_model_len=400)
    door.broker.script = cut_by(3, 1, 7, text=text, end=finish)
    assert events_of(await other.retrieve(id, stream="true")) == original
    for number in range(len(original) - 1):
        assert events_of(await other.retrieve(id, stream="true", starting_after=number)) == original[number + 1 :]
    assert events_of(await other.retrieve(id, stream="true", starting_after=len(original) + 5)) == original[-1:]


async def test_calls_are_items_of_their_own() -> None:
    door = ResponsesDoor(say(f"so {CALL}{CALL}"), max_model_len=400)
    events = await door.events(tools=[TOOL])
    deltas = kinds(events).count("output_text.delta")
    assert kinds(events) == [*BEGIN, *["output_text.delta"] * deltas, *DONE, *CALLED, *CALLED, "completed"]
    message, first, second = events[-1]["response"]["output"]
    assert message["content"][0]["text"].strip() == "so"
    assert (first["type"], first["name"], json.loads(first["arguments"])) == ("function_call", "look", {"at": 1})
    assert first["call_id"] != second["call_id"] and first["id"] != second["id"]
    assert events[-1]["response"]["output"] == (await door.retrieve(events[-1]["response"]["id"])).json()["output"]
    assert [event["item"]["id"] for event in events if event["type"].endswith("item.done")][1:] == [
        first["id"],
        second["id"],
    ]


async def test_one_call_only_where_one_is_wanted_and_none_without_tools() -> None:
    door = ResponsesDoor(say(f"{CALL}{CALL}"), max_model_len=400)
    single = (await door.respond(tools=[TOOL], parallel_tool_calls=False)).json()
    assert [item["type"] for item in single["output"]] == ["function_call"]
    assert text_of((await door.respond()).json()) == CALL * 2


async def test_progress_is_told_before_the_first_token() -> None:
    door = ResponsesDoor()
    door.broker.position = 3
    assert kinds(await door.events(progress=True))[-1] == "completed"


async def test_a_background_stream_goes_on_without_its_reader() -> None:
    door = ResponsesDoor(hang(Entry(0, (104,))))
    request = door.broker.requests
    await door.respond(background=True)
    assert request[0].orphan_s is None
    door.broker.script = say("hello")
    assert told(await door.events(background=True)) == "hello"
    assert request[1].orphan_s is None and not door.broker.cancelled
