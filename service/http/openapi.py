"""What OpenAPI says of the routes beyond what their functions show: bodies, parameters, headers, statuses.

Descriptions only. The /docs page renders them; nothing is decided here.
"""

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from service.http.answers import Cancelling, GenerateAnswer, Problem, Submitted
from service.http.problems import MEDIA_TYPE, PROBLEMS
from service.http.resume import AFTER, ALLOWED_COUNTS, ALLOWED_KEY, KEY, LAST_EVENT, PROGRESS, STREAM
from service.http.schemas import GenerateRequest

TEXT = {"schema": {"type": "string"}}
EVENTS = (
    "or its events, one for each token, then one that ends it, then [DONE]. Readers of the same request get the same "
    "events, byte for byte; only where it has several choices they may be interleaved otherwise. What ends without "
    "[DONE] goes on, and can be read with its last event id"
)


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's responses for these statuses; a description begins with the problem's code."""
    schema = Problem.model_json_schema()
    told: dict[int | str, dict[str, object]] = {}
    for status in statuses:
        about = ". ".join(f"{code}: {title}" for code, (of, title) in PROBLEMS.items() if of == status)
        told[status] = {"description": about, "content": {MEDIA_TYPE: {"schema": schema}}}
    return told


def schema_of(body: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a body, every part of it written out where it is used: what points to a schema's own
    definitions points nowhere in a larger document. A schema that holds itself has no such form."""
    schema = body.model_json_schema()
    defined = schema.pop("$defs", {})

    def written_out(part: Any) -> Any:
        if isinstance(part, list):
            return [written_out(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return written_out(defined[part["$ref"].removeprefix("#/$defs/")])
        return {key: written_out(value) for key, value in part.items()}

    return {key: written_out(value) for key, value in schema.items()}


def _parameter(name: str, where: str, about: str, allowed: str, **schema: object) -> dict[str, object]:
    return {"name": name, "in": where, "description": f"{about}. Allowed: {allowed}", "schema": TEXT["schema"] | schema}


def _answer(about: str) -> dict[str, object]:
    return {"model": GenerateAnswer, "description": about, "content": {"text/event-stream": TEXT}}


GENERATE: dict[str, Any] = {
    "response_class": Response,
    "openapi_extra": {
        "parameters": [
            _parameter(
                KEY,
                "header",
                "The same key with the same body gives the request that it gave first, from the start",
                ALLOWED_KEY,
            )
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema_of(GenerateRequest)}},
        },
    },
    "responses": {
        200: _answer(f"The answer, {EVENTS}")
        | {"headers": {"Content-Location": {"description": "Of a stream, the URL to read it at", **TEXT}}},
        202: {
            "model": Submitted,
            "description": "It was asked for in the background",
            "headers": {"Location": {"description": "The URL to read it at", **TEXT}},
        },
        **problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 431, 500, 503),
    },
}

READ: dict[str, Any] = {
    "response_class": Response,
    "openapi_extra": {
        "parameters": [
            _parameter(
                LAST_EVENT,
                "header",
                f"The id of the last event that the client has; goes before `{AFTER}`",
                f"the id of the request, a colon, and {ALLOWED_COUNTS}",
            ),
            _parameter(
                AFTER, "query", "How many tokens the client has; one count goes for all choices", ALLOWED_COUNTS
            ),
            _parameter(
                STREAM,
                "query",
                "Whether to answer with events; if absent, unless `Accept` is application/json",
                "true or false",
                enum=["true", "false"],
            ),
            _parameter(
                PROGRESS,
                "query",
                "Whether a stream tells, in comments, how the request stands until its first token comes",
                "true or false",
                enum=["true", "false"],
            ),
        ]
    },
    "responses": {200: _answer(f"The answer, once it is there, {EVENTS}"), **problems(401, 404, 422, 500, 503)},
}

CANCEL: dict[str, Any] = {
    "response_class": Response,
    "status_code": 202,
    "responses": {
        202: {"model": Cancelling, "description": "What has not ended will end"},
        **problems(401, 404, 422, 503),
    },
}
