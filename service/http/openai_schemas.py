"""What OpenAI's clients send, as schemas: conversations, tools, and the fields of the two completion routes.

Types and bounds only, and only of what the native route lacks or has otherwise: all else is checked by the native
schema. Strict like that one, but inside a message or a tool unknown keys are passed over, since clients send their own.
It knows no model. Every description of a field ends with `Allowed: ...`, which errors quote.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOOLS, MAX_TOOL_CALLS, MAX_NAME_CHARS = 128, 128, 64

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Lenient(BaseModel):
    """Strict in what it knows; what it does not know is nobody's business."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class Part(Lenient):
    """One part of a message. Text is the only kind that a text model reads."""

    type: Literal["text"]
    text: str


class FunctionCall(Lenient):
    """`arguments` is a JSON object, written out."""

    name: Name
    arguments: str = ""


class ToolCall(Lenient):
    """What an assistant has called."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    """One turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Lenient):
    """`parameters` is a JSON Schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """What the model may call."""

    type: Literal["function"]
    function: Function


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
