"""From the body of `POST /v1/responses` to what is asked, in the native route's terms, and what the answer repeats.

Input items become the messages of a conversation, as chat has them. It knows no answer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from service.errors import InvalidRequest
from service.http.body import check
from service.http.intake import Asked
from service.http.openai_asked import NOWHERE, read_body
from service.http.openai_forms import FORMS, forced, formed
from service.http.openai_prompt import conversation
from service.http.openai_schemas import Function, FunctionCall, Message, NamedFunction, NamedTool, Tool, ToolCall
from service.http.responses_schemas import (
    NOT_HONOURED,
    SHARED,
    Called,
    CallOutput,
    ChosenFunction,
    Content,
    FunctionTool,
    Item,
    ResponsesRequest,
    TextConfig,
    Turn,
)
from service.http.schemas import ALLOWED, MAX_COUNT, GenerateRequest

RESPONSE = "resp_"  # how ids begin
PLAIN: dict[str, Any] = {"format": {"type": "text"}}
ONE_FORM = "absent where the answer has another form to keep"


@dataclass(frozen=True, slots=True)
class Told:
    """What a response says of its request, beside what can be read off that; it is stored with it, as `Asked.about`.
    `calls` are the names of the tools that may be called."""

    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, str]
    parallel_tool_calls: bool
    text: dict[str, Any]
    truncation: str
    store: bool
    background: bool
    user: str | None
    calls: list[str]

    def about(self) -> str:
        """As text."""
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def of(cls, about: str) -> "Told":
        """From what `about` gave."""
        return cls(**orjson.loads(about))


def response(data: object) -> tuple[Asked, dict[str, str]]:
    """What the body asks for, and the headers of the answer. Raises `InvalidRequest` and `InvalidFields`."""
    body, shared, headers = read_body(ResponsesRequest, data, SHARED, NOT_HONOURED)
    if body.background and body.store is False:
        raise InvalidRequest("background", True, "false where `store` is false: it could not be read")
    tools = [_tool(tool) for tool in body.tools or ()]
    offered = [] if body.tool_choice == "none" else tools
    form = _form(body.text)
    if form is not None and shared.keys() & FORMS:
        raise InvalidRequest("text", form["type"], ONE_FORM)
    call = forced(_choice(body), offered)
    if call and (form is not None or shared.keys() & FORMS):
        raise InvalidRequest("tool_choice", body.tool_choice, "none or auto where the answer has another form to keep")
    asked = shared | {
        "max_tokens": body.max_output_tokens or MAX_COUNT,
        "on_overflow": "truncate_left" if body.truncation == "auto" else "reject",
        "background": bool(body.background),
        "response_format": form,
    }
    native = check(GenerateRequest, {"prompt": NOWHERE, **formed(asked | call)}, ALLOWED)
    if body.stream_options is not None and not native.stream:
        raise InvalidRequest("stream_options", "an object", "absent where `stream` is not true")
    if native.progress and not native.stream:
        raise InvalidRequest("progress", True, "false where `stream` is not true: it is told in streams only")
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    talk = conversation([*messages, *messages_of(body.input)], offered, "input")
    about = _told(body, [tool.function.name for tool in offered]).about()
    return Asked(native, (talk,), about, RESPONSE), headers


def messages_of(given: str | Sequence[Item]) -> list[Message]:
    """Calls that follow each other, or what the assistant said, are one message of its."""
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    messages: list[Message] = []
    for item in given:
        match item:
            case Turn():
                messages.append(Message(role=item.role, content=_text(item.content)))
            case CallOutput():
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=_text(item.output)))
            case Called():
                call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
                last = messages[-1] if messages and messages[-1].role == "assistant" else None
                if last is None:
                    messages.append(Message(role="assistant", tool_calls=[call]))
                else:
                    messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
    return messages


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: FunctionTool) -> Tool:
    fields = tool.model_dump(exclude_unset=True, exclude={"type"})
    return Tool(type="function", function=Function(**fields))


def _choice(body: ResponsesRequest) -> Any:
    if isinstance(body.tool_choice, ChosenFunction):
        return NamedTool(type="function", function=NamedFunction(name=body.tool_choice.name))
    return body.tool_choice


def _form(text: TextConfig | None) -> dict[str, Any] | None:
    """As a `response_format`; None where any text will do. Raises `InvalidRequest`."""
    wanted = text.format if text else None
    if wanted is None or wanted.type == "text":
        return None
    if (wanted.body is not None) != (wanted.type == "json_schema"):
        raise InvalidRequest("text.format.schema", wanted.body, "a JSON schema, with the type json_schema")
    if wanted.type == "json_object":
        return {"type": "json_object"}
    about = {"name": wanted.name, "schema": wanted.body, "description": wanted.description, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": {key: value for key, value in about.items() if value is not None}}


def _told(body: ResponsesRequest, calls: list[str]) -> Told:
    choice = body.tool_choice
    form = body.text.format if body.text else None
    return Told(
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        tools=[tool.model_dump() for tool in body.tools or ()],
        tool_choice=choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text={"format": form.model_dump(by_alias=True, exclude_none=True)} if form else PLAIN,
        truncation=body.truncation or "disabled",
        store=body.store is not False,
        background=bool(body.background),
        user=body.user,
        calls=calls,
    )
