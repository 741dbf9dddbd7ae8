"""What clients of OpenAI's Responses send, as schemas: input items, tools, the form of the text, and the body.

Types and bounds only. Lenient as `openai_schemas.py` is: inside of an item unknown keys are passed over. Every
description of a field ends with `Allowed: ...`, which errors quote.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from service.http.openai_schemas import MAX_TOOLS, NATIVE, UNHONOURED, Lenient, Name
from service.http.schemas import MAX_COUNT

MAX_ITEMS, MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 4096, 16, 64, 512


class TextPart(Lenient):
    """Text is the only kind that a text model reads."""

    type: Literal["input_text", "output_text", "text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class Turn(Lenient):
    """What somebody said. The answer of another response can be given back as it is."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class Called(Lenient):
    """A call that the assistant has made. `arguments` is a JSON object, written out."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str = ""


class CallOutput(Lenient):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


def _kind(item: object) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[Turn, Tag("message")]
    | Annotated[Called, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Lenient):
    """`parameters` is a JSON Schema."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Lenient):
    """The tool that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Lenient):
    """What the text must be. `schema` and what goes with it belong to the type json_schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, max_length=64)
    body: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = Field(None, max_length=4096)
    strict: bool | None = None


class TextConfig(Lenient):
    """`verbosity` is taken where it asks for nothing."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class StreamOptions(Lenient):
    """Nothing is obfuscated: that hides lengths from who watches an encrypted line, and the lines end elsewhere."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Lenient):
    """The body of `POST /v1/responses`, beside what the native route takes in the same words."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] = Field(
        description="What to answer. Allowed: a string, or a list of message, function_call and function_call_output "
        "items, with text as content"
    )
    instructions: str | None = Field(None, description="Goes before the input as system message. Allowed: a string")
    max_output_tokens: int | None = Field(
        None,
        description="Most tokens to generate; if absent, until the context is full. "
        f"Allowed: an integer from 1 to {MAX_COUNT}",
        ge=1,
        le=MAX_COUNT,
    )
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None,
        description="What the model may call; its chat template says how. Allowed: "
        f"at most {MAX_TOOLS} tools of the type function, with names of 1 to 64 letters, digits, _, . and -",
    )
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = Field(
        None,
        description="Whether the model calls a tool. Allowed: none, auto, required, or "
        '{"type": "function", "name": ...} with the name of one of the tools',
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether it may call several at once. Allowed: true or false"
    )
    text: TextConfig | None = Field(
        None,
        description='The form of the text. Allowed: {"format": ...} with {"type": "text"}, {"type": "json_object"} or '
        '{"type": "json_schema", "name": ..., "schema": {...}}',
    )
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)],
                Annotated[str, Field(max_length=MAX_VALUE_CHARS)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = Field(
        None,
        description="Given back with the response. Allowed: at most "
        f"{MAX_METADATA} strings of at most {MAX_VALUE_CHARS} characters, by keys of at most {MAX_KEY_CHARS}",
    )
    store: bool | None = Field(
        None, description="Whether it can be read again, for a while; yes if absent. Allowed: true or false"
    )
    background: bool | None = Field(
        None,
        description="Answer at once, and go on without a reader. Allowed: true or false; false where `store` is false",
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="What to do with an input that fills the context. Allowed: disabled to refuse it, or auto to keep "
        "its end",
    )
    stream_options: StreamOptions | None = Field(
        None, description="Changes nothing. Allowed: an object, where `stream` is true"
    )
    user: str | None = Field(None, description="Given back with the response. Allowed: a string")


# What means the same on the native route and is checked by its schema.
SHARED = NATIVE - {"n", "response_format", "on_overflow"}

# Known fields that would change the answer and are not honoured -> the values with which they change nothing.
NOT_HONOURED: dict[str, tuple[object, ...]] = {
    **{name: neutral for name, neutral in UNHONOURED.items() if name != "background"},
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "moderation": (),
    "n": (1,),
    "on_overflow": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "response_format": (),
    "top_logprobs": (0,),
}
