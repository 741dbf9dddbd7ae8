"""Tool calls: found in what a model writes, however it is cut into tokens, and told in OpenAI's words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.openai_tools import Call, CallFinder
from tests.service.helpers_http import LENGTH, say
from tests.service.helpers_openai import OpenAIDoor, chunks_of, said

F1 = Call("f", '{"x":1}')
WRITTEN: list[tuple[str, list[str | Call]]] = [
    ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [F1]),
    ('Let me see.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', ["Let me see.\n", F1]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\n',
     [F1, Call("g", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"x": "}</tool_call>\\""}}</tool_call>ok',
     [Call("f", '{"x":"}</tool_call>\\""}'), "ok"]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', [F1, Call("g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"x": 1}', [F1]),
    ('[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{"x": 1}', [F1, F1]),
    ('{"name": "f", "parameters": {"x": 1}}', [F1]),
    (' {"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', [F1, Call("g", "{}")]),
    ('<|python_tag|>{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}', [F1]),
    ('{"name": "Ann", "age": 3} is JSON', ['{"name": "Ann", "age": 3} is JSON']),
    ('{"a": [1]}', ['{"a": [1]}']),
    ("a < b and <tool", ["a < b and <tool"]),
    ("<tool_call>oops</tool_call>", ["<tool_call>oops</tool_call>"]),
    ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
    ('<tool_call>{"name": "f", "argu', ['<tool_call>{"name": "f", "argu']),
    ("[TOOL_CALLS] see above", ["[TOOL_CALLS] see above"]),
    ("  ", ["  "]),
    ("", []),
]  # fmt: skip


def found(pieces: list[str]) -> list[str | Call]:
    """What is found, neighbouring texts joined."""
    finder = CallFinder({"f", "g"})
    parts = [part for piece in pieces for part in finder.push(piece)] + finder.finish()
    joined: list[str | Call] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("text, expected", WRITTEN)
def test_calls_are_found_in_every_family_s_words(text: str, expected: list[str | Call]) -> None:
    assert found([text]) == expected
    assert found(list(text)) == expected


@given(st.sampled_from([text for text, _ in WRITTEN]), st.lists(st.integers(0, 90), max_size=6))
def test_it_does_not_matter_how_tokens_cut_the_text(text: str, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(text)) for cut in cuts)
    assert found([text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]) == found([text])


def test_text_that_can_be_no_call_is_not_held_back() -> None:
    finder = CallFinder({"f"})
    assert [finder.push(text) for text in ('{"a"', "b <", "div>")] == [['{"a"'], ["b "], ["<div>"]]


CALLING = 'So: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


async def test_a_call_comes_back_as_one_whole_and_streamed() -> None:
    door = OpenAIDoor(say(CALLING), max_model_len=200)
    (choice,) = (await door.chat(tools=TOOLS)).json()["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "So: "} and choice["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "f", "arguments": '{"x":1}'} and len(call["id"]) == 9
    chunks = chunks_of(await door.chat(tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed[0]["function"] == call["function"] and streamed[0]["index"] == 0
    assert said(chunks) == "So: " and deltas[0] == {"role": "assistant", "content": "S"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "script, fields, calls",
    [
        (say(CALLING), {}, 0),  # no tools were offered
        (say(CALLING), {"tools": TOOLS, "tool_choice": "none"}, 0),
        (say(CALLING[:-20], LENGTH), {"tools": TOOLS}, 0),
        (say(CALLING + CALLING[4:]), {"tools": TOOLS}, 2),
        (say(CALLING + CALLING[4:]), {"tools": TOOLS, "parallel_tool_calls": False}, 1),
    ],
)
async def test_what_is_not_a_call_is_text(script: Any, fields: dict[str, Any], calls: int) -> None:
    for stream in (False, True):
        response = await OpenAIDoor(script, max_model_len=200).chat(**fields, stream=stream)
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response)]
            text, found_calls = said(chunks_of(response)), [c for d in deltas for c in d.get("tool_calls", [])]
        else:
            message = response.json()["choices"][0]["message"]
            text, found_calls = message["content"], message.get("tool_calls", [])
        assert len(found_calls) == calls and ("<tool_call>" in text) == (calls == 0)


async def test_tools_and_their_answers_reach_the_template() -> None:
    door = OpenAIDoor(max_model_len=200)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    assert (await door.chat(turns, tools=TOOLS)).status_code == 200
    assert len(door.broker.requests[0].prompt_ids) == len("a:|t:7|1")
