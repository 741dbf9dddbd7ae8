"""What OpenAPI says of OpenAI's routes. Descriptions only; nothing is decided here.

A body's schema is that of the route's own fields and of those it shares with the native route.
"""

from typing import Any

from starlette.responses import Response

from service.http.openai_asked import IGNORED
from service.http.openai_schemas import NATIVE, OpenAIRequest
from service.http.openapi import CANCEL as NATIVE_CANCEL
from service.http.openapi import GENERATE as NATIVE_GENERATE
from service.http.openapi import READ as NATIVE_READ
from service.http.openapi import TEXT, schema_of
from service.http.problems import PROBLEMS
from service.http.schemas import GenerateRequest

JSON, EVENTS = "application/json", "text/event-stream"
STATUSES = {422: 400}  # OpenAI's clients know 400 where the native route says 422


def _properties(**types: str) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in types.items()},
        "required": list(types),
    }


ERROR = _properties(error="object") | {
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "n_prompt_tokens": {"type": "integer"},
                "n_ctx": {"type": "integer"},
            },
            "required": ["message", "type", "param", "code"],
        }
    }
}
ANSWER = _properties(id="string", object="string", created="integer", model="string", choices="array", usage="object")
CARD = _properties(id="string", object="string", created="integer", owned_by="string", max_model_len="integer")


def refusals(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's responses for these statuses; a description begins with the error's code."""
    told: dict[int | str, dict[str, object]] = {}
    for status in statuses:
        codes = {code: title for code, (of, title) in PROBLEMS.items() if STATUSES.get(of, of) == status}
        about = ". ".join(f"{code}: {title}" for code, title in codes.items())
        told[status] = {"description": about, "content": {JSON: {"schema": ERROR}}}
    return told


def _answer(about: str, schema: dict[str, object], with_events: bool = False) -> dict[str, object]:
    content: dict[str, object] = {JSON: {"schema": schema}}
    return {"description": about, "content": content | ({EVENTS: TEXT} if with_events else {})}


def body_schema(schema: type[OpenAIRequest]) -> dict[str, Any]:
    """Of a whole body: the route's own fields first, then those in the native route's words."""
    own, native = schema_of(schema), schema_of(GenerateRequest)
    shared = {name: told for name, told in native["properties"].items() if name in NATIVE}
    return own | {"properties": own["properties"] | shared}


def asks(schema: type[OpenAIRequest]) -> dict[str, Any]:
    """Of a route that takes such a body and answers whole or streamed."""
    headers = {
        IGNORED: {"description": "The fields that were passed over, for nobody here knows them", **TEXT},
        "Content-Location": {"description": "Of a stream, the URL to read it at", **TEXT},
    }
    told = _answer("The answer, or its chunks and then [DONE]", ANSWER, with_events=True)
    return {
        "response_class": Response,
        "openapi_extra": {
            "parameters": NATIVE_GENERATE["openapi_extra"]["parameters"],
            "requestBody": {"required": True, "content": {JSON: {"schema": body_schema(schema)}}},
        },
        "responses": {200: told | {"headers": headers}, **refusals(400, 404, 409, 413, 415, 429, 499, 500, 503, 504)},
    }


READ: dict[str, Any] = {
    "response_class": Response,
    "openapi_extra": NATIVE_READ["openapi_extra"],
    "responses": {
        200: _answer("The answer, once it is there, or its chunks", ANSWER, with_events=True),
        **refusals(400, 404, 499, 500, 503, 504),
    },
}
CANCEL: dict[str, Any] = NATIVE_CANCEL | {
    "responses": {202: NATIVE_CANCEL["responses"][202], **refusals(400, 404, 503)}
}
MODELS: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: _answer("A list of one", _properties(object="string", data="array")), **refusals(503)},
}
MODEL: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: _answer("Its name and limits", CARD), **refusals(404, 503)},
}
