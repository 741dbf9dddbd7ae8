"""Grammars at the door: what is taken, what is refused and in which words, and that no grammar takes the door down."""

import asyncio
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from model.grammar_check import MAX_REMEMBERED, MAX_WAITING, GrammarCheck
from model.request import Grammar
from tests.service.helpers_http import Door

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def by_schema(schema: object) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def nested(depth: int) -> Json:
    schema: Json = {"type": "null"}
    for _ in range(depth - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


async def refused(**fields: object) -> tuple[str, str]:
    """The field that was named, and what is allowed."""
    response = await Door().generate(**fields)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), response.text
    (error,) = response.json()["errors"]
    assert "\n" not in error["allowed"] and len(error["allowed"]) < 400
    return error["field"], error["allowed"]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (by_schema(OBJECT), Grammar("json_schema", json.dumps(OBJECT))),
        ({"regex": "[a-z]{3}"}, Grammar("regex", "[a-z]{3}")),
        ({"grammar": 'start: "a" | "b"'}, Grammar("lark", 'start: "a" | "b"')),
        ({"grammar": "start: %json " + json.dumps(OBJECT)}, Grammar("lark", "start: %json " + json.dumps(OBJECT))),
    ],
)
async def test_what_is_asked_for_goes_with_every_sequence(fields: Json, grammar: Grammar | None) -> None:
    door = Door()
    response = await door.generate(n=2, **fields)
    assert response.status_code == 200, response.text
    assert [request.grammar for request in door.broker.requests] == [grammar, grammar]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (nested(20), "16 schemas deep"),
        ({"anyOf": [{"type": "object", "properties": {}}] * 600}, "512 schemas"),
        ({"enum": list(range(257))}, "256 values"),
        ({"type": "string", "pattern": "a" * 257}, "256 characters"),
        ({"patternProperties": {"a" * 257: {}}}, "256 characters"),
        ({"const": "a" * 33_000}, "32768 characters"),
        ({"$ref": "https://example.com/schema.json"}, "beginning with #"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "beginning with #"),
        ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, '"if"'),
        ({"type": "strng"}, "strng"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "Unsatisfiable"),
    ],
)
async def test_a_schema_that_output_can_not_be_held_to_is_refused(schema: Json, why: str) -> None:
    field, allowed = await refused(**by_schema(schema))
    assert field == "response_format" and why in allowed


@pytest.mark.parametrize("schema", [nested(16), {"enum": list(range(256))}, {"type": "string", "pattern": "a" * 256}])
async def test_a_schema_at_the_limits_is_taken(schema: Json) -> None:
    assert (await Door().generate(**by_schema(schema))).status_code == 200


@pytest.mark.parametrize(
    ("field", "text", "why"),
    [
        ("regex", "a" * 1025, "1024 characters"),
        ("regex", "", "1024 characters"),
        ("regex", "(", "unclosed"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "some text matches"),
        ("grammar", "a" * 8193, "8192 characters"),
        ("grammar", 'beginning: "a"', "start"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "start: <|endoftext|>", "special_token"),
        ("grammar", '%llguidance {}\nstart: "a"', "%llguidance"),
        ("grammar", "start: %json {", "JSON schema"),
        ("grammar", 'start: %json {"$ref": "http://example.com"}', "beginning with #"),
        ("grammar", 'start: %json {"x-guidance": {"lenient": true}}', "x-guidance"),
        ("grammar", "start: " + "(" * 4000 + '"a"' + ")" * 4000, "nested"),
    ],
)
async def test_an_expression_or_grammar_that_can_not_be_followed_is_refused(field: str, text: str, why: str) -> None:
    named, allowed = await refused(**{field: text})
    assert named == field and why in allowed


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": []}},
        {"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}},
        {"type": "json_schema", "json_schema": {"schema": {}, "strickt": True}},
        {},
    ],
)
async def test_a_form_that_does_not_exist_is_refused(form: Json) -> None:
    body = json.dumps({"prompt": "hi", "response_format": form})
    response = await Door().ask("POST", "/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["errors"]] == ["response_format"]


async def test_two_grammars_at_once_are_refused() -> None:
    field, allowed = await refused(regex="a", response_format={"type": "json_object"})
    assert field == "regex" and "response_format" in allowed


async def test_a_prompt_that_ends_inside_a_character_can_not_go_on_as_a_grammar_says() -> None:
    half = Door().backend.get()[0].tokenizer.encode("é")[:1]
    assert (await Door().generate(half)).status_code == 200
    response = await Door().generate(half, regex="a")
    assert response.json()["errors"][0]["field"] == "prompt"


HOSTILE = {
    "a multiple": by_schema({"type": "integer", "multipleOf": 9_876_543}),
    "multiples": by_schema({"allOf": [{"type": "integer", "multipleOf": p} for p in (7, 11, 13, 17, 19, 23, 29)]}),
    "patterns": by_schema(
        {"allOf": [{"type": "string", "pattern": f".*{c}.{{{i}}}"} for i, c in enumerate("abcdefghijklmnopqrst")]}
    ),
    "doubling": {"grammar": "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"'},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_grammar_that_never_compiles_is_refused_and_others_do_not_wait(name: str) -> None:
    door = Door()
    hostile = asyncio.create_task(door.generate(**HOSTILE[name]))
    while not hostile.done():
        assert (await door.generate()).status_code == 200
    response = await hostile
    assert response.status_code == 422
    told = response.json()["errors"][0]["allowed"]
    assert "compiles within" in told or "too big" in told  # whichever limit is met first, on a busy machine
    assert (await door.generate(**HOSTILE[name])).status_code == 422  # known by now: no child is killed for it
    assert (await door.generate(regex="a")).status_code == 200


def test_what_was_said_is_remembered_and_not_for_ever() -> None:
    check = GrammarCheck()
    for i in range(MAX_REMEMBERED + 3):
        assert check.submit(Grammar("regex", f"a{{{i}}}")).result() == ""
    assert len(check._said) == MAX_REMEMBERED


def test_a_child_that_ends_is_followed_by_another() -> None:
    check = GrammarCheck()
    assert check.submit(Grammar("regex", "a")).result() == ""
    assert check._child is not None
    check._child.kill()
    check._child.wait()
    assert check.submit(Grammar("regex", "b")).result() == ""


def test_a_child_does_not_outlive_its_check() -> None:
    check = GrammarCheck()
    check.submit(Grammar("regex", "a")).result()
    child = check._child
    assert child is not None and child.poll() is None
    del check
    gc.collect()
    assert child.wait(timeout=10) is not None


async def test_so_many_grammars_wait_and_the_next_is_told_to_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, door = threading.Event(), Door()
    check = door.backend.get()[0].grammars
    monkeypatch.setattr(check, "_ask", lambda grammar: "" if go_on.wait(10) else "nobody came")
    waiting = [asyncio.create_task(door.generate(regex=f"z{{{i}}}")) for i in range(MAX_WAITING)]
    async with asyncio.timeout(10):
        while check._num_waiting < MAX_WAITING:  # noqa: ASYNC110
            await asyncio.sleep(0)
    response = await door.generate(regex="one more")
    go_on.set()
    assert (response.status_code, response.json()["code"]) == (429, "overloaded")
    assert [(await task).status_code for task in waiting] == [200] * MAX_WAITING


def test_the_trial_needs_no_torch() -> None:
    code = "import sys, model.grammar_check, service.http.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
