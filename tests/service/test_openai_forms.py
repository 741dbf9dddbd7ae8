"""Answers that must have a form: forced calls, and schemas without what they do not name."""

import json
from typing import Any

import pytest

from model.request import Grammar
from service.http.openai_forms import call_of, closed
from service.http.openai_schemas import Function, Tool
from tests.service.helpers_http import say
from tests.service.helpers_openai import OpenAIDoor

LIST = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}, "x": {"$ref": "#/$defs/X"}},
    "$defs": {"X": {"enum": [1]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": LIST}} for name in ("f", "g-1")
]


@pytest.mark.parametrize(
    "choice, names", [("required", ["f", "g-1"]), ({"type": "function", "function": {"name": "f"}}, ["f"])]
)
async def test_a_forced_call_is_a_grammar_and_comes_back_as_a_call(choice: object, names: list[str]) -> None:
    door = OpenAIDoor(say('{"name": "f", "arguments": {"x": 1}}'), max_model_len=100)
    response = await door.chat(tools=TOOLS, tool_choice=choice)
    (told,) = response.json()["choices"]
    assert told["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x":1}'}
    assert (told["message"]["content"], told["finish_reason"]) == (None, "tool_calls")
    tools = [Tool.model_validate(tool) for tool in TOOLS if tool["function"]["name"] in names]
    assert door.broker.requests[0].grammar == Grammar("json_schema", json.dumps(closed(call_of(tools))))


async def test_a_form_and_a_forced_call_exclude_each_other() -> None:
    for other in ({"response_format": {"type": "json_object"}}, {"regex": "a"}):
        response = await OpenAIDoor().chat(tools=TOOLS, tool_choice="required", **other)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


async def test_a_tool_that_was_not_offered_cannot_be_forced() -> None:
    response = await OpenAIDoor().chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "h"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


A: dict[str, Any] = {"properties": {"a": {}}}
B: dict[str, Any] = {"properties": {"b": {}}}
SHUT: dict[str, Any] = A | {"additionalProperties": False}


@pytest.mark.parametrize(
    "schema, expected",
    [
        (A, SHUT),
        ({"items": A}, {"items": SHUT}),
        (
            {"$defs": {"A": A}, "anyOf": [A, {"type": "null"}]},
            {"$defs": {"A": SHUT}, "anyOf": [SHUT, {"type": "null"}]},
        ),
        ({"properties": {"properties": A}}, {"properties": {"properties": SHUT}, "additionalProperties": False}),
        (A | {"required": ["z"]}, A | {"required": ["z"], "additionalProperties": True}),
        (A | {"additionalProperties": {"type": "string"}}, A | {"additionalProperties": {"type": "string"}}),
        (A | {"anyOf": [B]}, A | {"anyOf": [B]}),
        ({"allOf": [A, B]}, {"allOf": [A, B]}),
        ({"type": "string"}, {"type": "string"}),
    ],
)
def test_objects_are_closed_where_they_are_described_whole(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert closed(schema) == expected


async def test_a_schema_of_the_answer_is_closed_and_a_bad_one_refused_by_name() -> None:
    door = OpenAIDoor(say("{}"))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": A}}
    assert (await door.chat(response_format=form)).status_code == 200
    grammar = door.broker.requests[0].grammar
    assert grammar and '"additionalProperties":false' in grammar.text.replace(" ", "")
    refused = await OpenAIDoor().chat(response_format={"type": "json_schema"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_the_parameters_of_a_tool_still_point_into_themselves() -> None:
    told = call_of([Tool(type="function", function=Function(name="f", parameters=LIST | {"$id": "x", "$schema": "y"}))])
    inner = {"next": {"$ref": "#/$defs/tool_0"}, "x": {"$ref": "#/$defs/tool_0/$defs/X"}}
    expected = {"type": "object", "properties": inner, "$defs": {"X": {"enum": [1]}}, "additionalProperties": False}
    assert told["$defs"] == {"tool_0": expected}
