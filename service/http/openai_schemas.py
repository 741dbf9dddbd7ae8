"""What OpenAI's clients send, as schemas: conversations, tools, and the fields of the two completion routes.

Types and bounds only, and only of what the native route lacks or has otherwise: all else is checked by the native
schema. Strict like that one, but inside a message or a tool unknown keys are passed over, since clients send their own.
It knows no model. Every description of a field ends with `Allowed: ...`, which errors quote.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.http.schemas import MAX_COUNT, GenerateRequest, TokenId

MAX_TOOLS, MAX_TOOL_CALLS, MAX_PROMPTS = 128, 128, 64
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat goes on until the context is full

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


class NamedFunction(Lenient):
    """Of a tool that must be called."""

    name: Name


class NamedTool(Lenient):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Lenient):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIRequest(Lenient):
    """What both routes have and the native one lacks. Absent and null are the same in all of it."""

    stream_options: StreamOptions | None = Field(
        None,
        description="`include_usage`: a last chunk tells the usage; `continuous_usage_stats`: every chunk does. "
        "Allowed: an object of true or false, where `stream` is true",
    )
    best_of: int | None = Field(
        None, description="Every answer is given back, none chosen. Allowed: the value of `n`", ge=1, le=MAX_COUNT
    )
    user: str | None = Field(None, description="Changes nothing. Allowed: a string")


class CompletionRequest(OpenAIRequest):
    """The body of `POST /v1/completions`, beside what the native route takes in the same words."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
        ]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
    ) = Field(
        description="What to continue; every prompt gets `n` answers. Allowed: a non-empty string, a non-empty list of "
        f"token ids of the vocabulary, or a list of 1 to {MAX_PROMPTS} of either"
    )
    max_tokens: int = Field(
        DEFAULT_COMPLETION_TOKENS,
        description=f"Most tokens to generate for each answer. Allowed: an integer from 1 to {MAX_COUNT}",
        ge=1,
        le=MAX_COUNT,
    )
    logprobs: int | None = Field(
        None,
        description="Tell log-probabilities: of the drawn token and the k likeliest. Allowed: an integer from 0 to 20",
        ge=0,
        le=20,
    )
    echo: bool = Field(
        False, description="Begin the text with the prompt's. Allowed: true or false; false with `logprobs`"
    )


class ChatRequest(OpenAIRequest):
    """The body of `POST /v1/chat/completions`, beside what the native route takes in the same words."""

    messages: Messages = Field(
        description="The conversation so far. Allowed: a non-empty list of messages with the role system, developer, "
        "user, assistant or tool, and a string or text parts as content"
    )
    tools: Tools | None = Field(
        None,
        description="What the model may call; its chat template says how. Allowed: "
        f"at most {MAX_TOOLS} tools of the type function, with names of 1 to 64 letters, digits, _, . and -",
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None,
        description="Whether the model calls a tool. Allowed: none, auto, required, or "
        '{"type": "function", "function": {"name": ...}} with the name of one of the tools',
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether it may call several at once. Allowed: true or false"
    )
    max_tokens: int | None = Field(
        None,
        description="Most tokens to generate for each answer; if absent, until the context is full. "
        f"Allowed: an integer from 1 to {MAX_COUNT}",
        ge=1,
        le=MAX_COUNT,
    )
    max_completion_tokens: int | None = Field(
        None,
        description=f"The same as `max_tokens`. Allowed: an integer from 1 to {MAX_COUNT}",
        ge=1,
        le=MAX_COUNT,
    )
    logprobs: bool = Field(False, description="Tell log-probabilities of the drawn tokens. Allowed: true or false")
    top_logprobs: int | None = Field(
        None,
        description="Of how many of the likeliest tokens as well. Allowed: an integer from 0 to 20, with `logprobs`",
        ge=0,
        le=20,
    )


# What means the same on the native route and is checked by its schema.
NATIVE = frozenset(GenerateRequest.model_fields) - {"prompt", "max_tokens", "logprobs", "echo", "background"}

# Known fields that would change the answer and are not honoured -> the values with which they change nothing.
UNHONOURED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "background": (False,),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "xtc_probability": (0,),
}
