"""A conversation as a prompt: messages and tools in the form that chat templates expect, then text or ids of them.

It knows messages and templates, no route and no sampling. What a client wrote is text, even where it looks like one of
the tokenizer's control tokens: only the template's own words control anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from model.chat_template import ChatTemplateError
from model.tokenizer import Tokenizer
from service.errors import InvalidRequest
from service.http.openai_schemas import Message, Part, Tool, ToolCall

ALLOWED_ARGUMENTS = "a JSON object, written out as a string"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools as a template gets them. `num_chars` is about how much text that is: a long one does not
    belong on an event loop."""

    messages: tuple[dict[str, object], ...]
    tools: tuple[dict[str, object], ...] = ()
    num_chars: int = 0
    field: str = "messages"  # what the client calls it

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The ids, up to where the answer begins. Raises `InvalidRequest`."""
        try:
            return tokenizer.encode_chat(self.messages, tools=list(self.tools) or None)
        except (ValueError, RecursionError) as error:
            raise self._refused(error) from None

    def write(self, tokenizer: Tokenizer) -> str:
        """The text, for people. Raises `InvalidRequest`."""
        try:
            return tokenizer.render_chat(self.messages, tools=list(self.tools) or None)
        except (ValueError, RecursionError) as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> InvalidRequest:
        if isinstance(error, ChatTemplateError):
            return InvalidRequest(self.field, len(self.messages), f"a conversation that the model can take: {error}")
        if isinstance(error, RecursionError):
            return InvalidRequest("tools", len(self.tools), "schemas and arguments that are not nested so deeply")
        return InvalidRequest(self.field, len(self.messages), "text that UTF-8 can hold, without half surrogate pairs")


def conversation(messages: Sequence[Message], tools: Sequence[Tool] = (), field: str = "messages") -> Conversation:
    """Raises `InvalidRequest` for arguments of a call that are no JSON object."""
    turned = tuple(_turn(f"{field}[{i}]", message) for i, message in enumerate(messages))
    offered = tuple(tool.model_dump(exclude_unset=True) for tool in tools)
    num_chars = sum(len(str(turn["content"])) for turn in turned) + sum(
        len(str(value)) for value in (*offered, *(turn.get("tool_calls", "") for turn in turned))
    )
    return Conversation(turned, offered, num_chars, field)


def _turn(field: str, message: Message) -> dict[str, object]:
    """Absent keys stay absent, since templates ask whether they are there; only the content always is."""
    role = "system" if message.role == "developer" else message.role  # templates seldom know the former
    turn: dict[str, object] = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_calls:
        turn["tool_calls"] = [_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(content: str | list[Part] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


def _call(field: str, call: ToolCall) -> dict[str, object]:
    """Templates write the arguments out themselves, so they get them as an object."""
    given = call.function.arguments
    try:
        arguments = orjson.loads(given or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field}.function.arguments", given, ALLOWED_ARGUMENTS)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
