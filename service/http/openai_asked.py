"""From the body of an OpenAI route to what is asked, in the native route's terms, and to how it is answered.

What the native route has in the same words is checked by its schema, the rest by `openai_schemas.py`. Fields that
nobody here knows are passed over and named; known ones that would change the answer and are not honoured are refused.
It knows no answer.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar
from urllib.parse import quote

import orjson
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.http.body import MAX_ERRORS, check
from service.http.intake import Asked, Prompt
from service.http.openai_forms import FORMS, forced, formed
from service.http.openai_prompt import conversation
from service.http.openai_schemas import (
    NATIVE,
    UNHONOURED,
    ChatRequest,
    CompletionRequest,
    Lenient,
    NamedTool,
    OpenAIRequest,
)
from service.http.problems import InvalidFields
from service.http.schemas import ALLOWED, MAX_COUNT, GenerateRequest

IGNORED = "x-millrace-ignored"  # the response header that names what was passed over
MAX_IGNORED, MAX_IGNORED_CHARS = 20, 64
NOWHERE = [0]  # the native schema wants a prompt; the real ones go beside it
CHAT, COMPLETION = "chatcmpl-", "cmpl-"  # how ids begin

Schema = TypeVar("Schema", bound=Lenient)
Neutral = Mapping[str, tuple[object, ...]]  # fields that are not honoured -> the values with which they change nothing
Choice = Literal["none", "auto", "required"] | NamedTool | None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the answer of an OpenAI route shall look like; it is stored with the request, as `Asked.about`. `tools` are
    the names of those that may be called; `calls` whether several may be."""

    usage: bool = False
    usage_always: bool = False
    tools: tuple[str, ...] = ()
    several_calls: bool = True

    def about(self) -> str:
        """As text."""
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def of(cls, about: str) -> "Wishes":
        """From what `about` gave."""
        told = orjson.loads(about)
        return cls(**(told | {"tools": tuple(told["tools"])}))


def completion(data: object) -> tuple[Asked, dict[str, str]]:
    """What the body of `POST /v1/completions` asks for, and the headers of the answer. Raises `InvalidRequest` and
    `InvalidFields`."""
    body, shared, headers = read_body(CompletionRequest, data)
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo", True, "false with `logprobs`: those of the prompt are not computed")
    native = _native(shared | {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "echo": body.echo}, body)
    prompts: tuple[Prompt, ...]
    match body.prompt:
        case str():
            prompts = (body.prompt,)
        case [int(), *_]:
            prompts = (_ids(body.prompt),)
        case _:
            prompts = tuple(prompt if isinstance(prompt, str) else _ids(prompt) for prompt in body.prompt)
    return Asked(native, prompts, _wishes(body, native).about(), COMPLETION), headers


def chat(data: object) -> tuple[Asked, dict[str, str]]:
    """What the body of `POST /v1/chat/completions` asks for, and the headers of the answer. Raises `InvalidRequest` and
    `InvalidFields`."""
    body, shared, headers = read_body(ChatRequest, data)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", body.top_logprobs, "an integer from 0 to 20, with `logprobs` true")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest("max_tokens", body.max_tokens, "the value of `max_completion_tokens`, or absent")
    tools = () if body.tool_choice == "none" else tuple(body.tools or ())
    chosen = forced(body.tool_choice, tools)
    if chosen and shared.keys() & FORMS:
        raise InvalidRequest("tool_choice", body.tool_choice, "none or auto where the answer has another form to keep")
    native = _native(
        shared
        | {"max_tokens": body.max_completion_tokens or body.max_tokens or MAX_COUNT}
        | ({"logprobs": body.top_logprobs or 0} if body.logprobs else {})
        | chosen,
        body,
    )
    names = tuple(tool.function.name for tool in tools)
    wishes = _wishes(body, native, names, body.parallel_tool_calls is not False)
    return Asked(native, (conversation(body.messages, tools),), wishes.about(), CHAT), headers


def read_body(
    schema: type[Schema], data: object, native: AbstractSet[str] = NATIVE, unhonoured: Neutral = UNHONOURED
) -> tuple[Schema, dict[str, object], dict[str, str]]:
    """The body's own fields, those for the native schema, and the headers that name the others. Raises
    `InvalidRequest` and `InvalidFields`."""
    if not isinstance(data, dict):
        raise InvalidRequest("body", data, "a JSON object")
    given = {key: value for key, value in data.items() if value is not None}
    for key in given.keys() & unhonoured.keys():
        if given[key] not in unhonoured[key]:
            raise InvalidRequest(key, given[key], _neutral(unhonoured[key]))
    known = schema.model_fields.keys() | native | unhonoured.keys()
    ignored = [key for key in data if key not in known]
    try:
        body = schema.model_validate(given)
    except ValidationError as error:
        raise fields(schema, given, error) from None
    return body, {key: value for key, value in given.items() if key in native}, _headers(ignored)


def fields(schema: type[Lenient], data: dict[str, object], error: ValidationError) -> InvalidFields:
    """What is wrong, by the path to it: of what was said of one field, what leads deepest into it."""
    found: dict[str, tuple[int, InvalidRequest]] = {}
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(detail["loc"][0])
        path, value, depth = name, data.get(name), 0
        steps = () if name == "prompt" else detail["loc"][1:]  # it is one of four kinds, and nobody knows which
        for step in steps:  # those that are not in the data are names of kinds that were tried
            if isinstance(value, dict) and isinstance(step, str) and (step in value or detail["type"] == "missing"):
                path, value, depth = f"{path}.{step}", value.get(step), depth + 1
            elif isinstance(value, list) and isinstance(step, int):
                path, value, depth = f"{path}[{step}]", value[step], depth + 1
        if name not in found or depth > found[name][0]:
            allowed = (schema.model_fields[name].description or "").rpartition("Allowed: ")[2]
            found[name] = depth, InvalidRequest(path, value, allowed)
    return InvalidFields([refused for _, refused in found.values()][:MAX_ERRORS])


def _neutral(neutral: tuple[object, ...]) -> str:
    values = " or ".join(orjson.dumps(value).decode() for value in neutral)
    return f"{values} or no such field: nothing else is done here" if values else "no such field: it is not done here"


def _native(fields: dict[str, object], body: OpenAIRequest) -> GenerateRequest:
    """Checked, and the options that go with each other too."""
    native = check(GenerateRequest, {"prompt": NOWHERE, **formed(fields)}, ALLOWED)
    if body.best_of is not None and body.best_of != native.n:
        raise InvalidRequest("best_of", body.best_of, f"the value of `n`, {native.n}, or absent")
    if body.stream_options is not None and not native.stream:
        raise InvalidRequest("stream_options", "an object", "absent where `stream` is not true")
    if native.progress and not native.stream:
        raise InvalidRequest("progress", True, "false where `stream` is not true: it is told in streams only")
    return native


def _wishes(
    body: OpenAIRequest, native: GenerateRequest, tools: tuple[str, ...] = (), several_calls: bool = True
) -> Wishes:
    options = body.stream_options
    always = bool(options and options.continuous_usage_stats)
    return Wishes(bool(options and options.include_usage) or always, always, tools, several_calls)


def _ids(prompt: object) -> list[int]:
    assert isinstance(prompt, list)
    return prompt


def _headers(ignored: list[str]) -> dict[str, str]:
    """A header can't hold any name, so each is written as in a URL."""
    names = [quote(key[:MAX_IGNORED_CHARS], errors="replace") for key in ignored[:MAX_IGNORED]]
    return {IGNORED: ", ".join(names)} if names else {}
