"""What OpenAPI says of the routes of OpenAI's Responses. Descriptions only; nothing is decided here."""

from typing import Any

from starlette.responses import Response

from service.http.openai_asked import IGNORED
from service.http.openai_openapi import EVENTS, JSON, refusals
from service.http.openapi import GENERATE as NATIVE_GENERATE
from service.http.openapi import TEXT, schema_of
from service.http.responses_schemas import SHARED, ResponsesRequest
from service.http.schemas import MAX_COUNT, GenerateRequest

ANSWER = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "status": {"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
        "model": {"type": "string"},
        "output": {"type": "array"},
    },
    "required": ["id", "object", "created_at", "status", "model", "output"],
}


def _body() -> dict[str, Any]:
    own, native = schema_of(ResponsesRequest), schema_of(GenerateRequest)
    shared = {name: told for name, told in native["properties"].items() if name in SHARED}
    return own | {"properties": own["properties"] | shared}


def _answer(about: str, with_events: bool) -> dict[str, object]:
    content: dict[str, object] = {JSON: {"schema": ANSWER}}
    return {"description": about, "content": content | ({EVENTS: TEXT} if with_events else {})}


def _query(name: str, about: str, schema: dict[str, object]) -> dict[str, object]:
    return {"name": name, "in": "query", "description": about, "schema": schema}


CREATE: dict[str, Any] = {
    "response_class": Response,
    "openapi_extra": {
        "parameters": NATIVE_GENERATE["openapi_extra"]["parameters"],
        "requestBody": {"required": True, "content": {JSON: {"schema": _body()}}},
    },
    "responses": {
        200: _answer("The response, or its events", with_events=True)
        | {
            "headers": {
                IGNORED: {"description": "The fields that were passed over, for nobody here knows them", **TEXT},
                "Content-Location": {"description": "Of a stream, the URL to read it at", **TEXT},
            }
        },
        **refusals(400, 404, 409, 413, 415, 429, 499, 500, 503, 504),
    },
}
READ: dict[str, Any] = {
    "response_class": Response,
    "openapi_extra": {
        "parameters": [
            _query(
                "stream",
                "Whether to answer with events; else with the response as it is now. Allowed: true or false",
                {"type": "string", "enum": ["true", "false"]},
            ),
            _query(
                "starting_after",
                "The `sequence_number` of the last event that the client has. Allowed: an integer, with stream=true",
                {"type": "integer", "minimum": 0, "maximum": MAX_COUNT},
            ),
        ]
    },
    "responses": {
        200: _answer("The response as it is now, or its events", with_events=True),
        **refusals(400, 404, 500, 503),
    },
}
CANCEL: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: _answer("The response", with_events=False), **refusals(400, 404, 500, 503)},
}
