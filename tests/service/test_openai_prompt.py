"""Conversations as prompts: what a template gets, and what is refused by the name of its field."""

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from model.tokenizer import Tokenizer
from service.errors import InvalidRequest
from service.http.intake import MAX_INLINE_CHARS, Asked, take_in
from service.http.openai_prompt import Conversation, conversation
from service.http.openai_schemas import Messages, Tools
from service.http.schemas import GenerateRequest
from tests.service.helpers_http import SERVED

BUNDLED = Path(__file__).parent.parent.parent / "model" / "bundled"
ECHO = "{% for m in messages %}[{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}]{% endfor %}"


def talk(*messages: object, tools: object = ()) -> Conversation:
    turns = TypeAdapter[Messages](Messages).validate_python(list(messages))
    return conversation(turns, TypeAdapter[Tools](Tools).validate_python(list(tools)) if tools else ())  # type: ignore


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(Tokenizer.load(BUNDLED)._backend, {"eos_token": "<|endoftext|>"}, template)


def test_parts_are_lines_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": {}}]
    told = talk({"role": "developer", "content": "be brief"}, {"role": "user", "content": parts})
    assert told.write(tokenizer(ECHO)) == "[system:be brief][user:one\ntwo]"


def test_calls_reach_the_template_as_objects_and_tools_as_they_were_sent() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    told = talk(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        tools=[tool],
    )
    written = told.write(tokenizer(ECHO + "{{ tools | tojson }}"))
    assert '"arguments": {"x": 1}' in written
    assert written.endswith('[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]')
    assert "[tool:2]" in written


def test_arguments_that_are_no_object_are_refused_by_field() -> None:
    call = {"function": {"name": "f", "arguments": "[1"}}
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
        talk({"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]})


def test_a_control_token_in_content_is_text() -> None:
    bundled = Tokenizer.load(BUNDLED)
    assert bundled.eos_id is not None
    ids = talk({"role": "user", "content": "The fox<|endoftext|> ran"}).encode(bundled)
    assert ids.count(bundled.eos_id) == 1  # the one that the template writes


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "the chat template fails"),
    ],
)
def test_what_the_template_refuses_is_refused(template: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        talk({"role": "user", "content": "hi"}).encode(tokenizer(template))


@pytest.mark.parametrize("num_chars, is_inline", [(MAX_INLINE_CHARS, True), (MAX_INLINE_CHARS + 1, False)])
async def test_a_long_conversation_is_not_encoded_on_the_loop(num_chars: int, is_inline: bool) -> None:
    @dataclass
    class Spy:
        num_chars: int
        thread: threading.Thread | None = None

        def encode(self, tokenizer: Tokenizer) -> list[int]:
            self.thread = threading.current_thread()
            return [1]

    spy = Spy(num_chars)
    await take_in(Asked(GenerateRequest(prompt=[0]), (spy,)), SERVED)
    assert (spy.thread is threading.main_thread()) == is_inline


def test_half_a_surrogate_pair_and_endless_nesting_are_refused() -> None:
    deep: dict[str, object] = {}
    for _ in range(900):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    with pytest.raises(InvalidRequest, match="nested"):
        talk({"role": "user", "content": "hi"}, tools=[tool]).encode(tokenizer(ECHO))
    lone = {"type": "function", "function": {"name": "f", "parameters": {"title": "\ud800"}}}
    with pytest.raises(InvalidRequest, match="surrogate"):
        talk({"role": "user", "content": "hi"}, tools=[lone]).encode(tokenizer(ECHO + "{{ tools | tojson }}"))
