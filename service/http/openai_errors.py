"""The error tree in OpenAI's words, and the choice between those and problem objects: each route in its own.

Shape: `{"error": {"message", "type", "param", "code"}}`; what programs react to beside that (lengths, waits) has names
that llama.cpp's clients know.
"""

import orjson
from starlette.responses import Response

from service.errors import InvalidRequest, MillraceError, PromptTooLong, TimedOut
from service.http.problems import PROBLEMS, InvalidFields, headers_of, problem, problem_response

OPENAI = "/v1/"  # routes that begin so answer in OpenAI's words
UNPROCESSABLE, BAD_REQUEST = 422, 400
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENTS_FAULT = range(400, 500)


def refused(path: str, error: MillraceError) -> Response:
    """The error as the answer of the route at `path`."""
    return openai_response(error) if path.startswith(OPENAI) else problem_response(error)


def openai_error(error: MillraceError) -> dict[str, object]:
    """The body, and of an event in a stream the data."""
    told = problem(error)
    about: dict[str, object] = {
        "message": told["detail"],
        "type": _type(_status(error)),
        "param": _param(error),
        "code": told["code"],
    }
    if isinstance(error, PromptTooLong):
        about |= {"n_prompt_tokens": error.num_prompt_tokens, "n_ctx": error.limit + 1}
    return {"error": about}


def openai_response(error: MillraceError) -> Response:
    """With the status that OpenAI's clients expect: they know 400 where we say 422. They try again after any status
    from 500 on; where the time was up that would only double the load, so they are told not to."""
    headers = headers_of(error) | ({"x-should-retry": "false"} if isinstance(error, TimedOut) else {})
    return Response(orjson.dumps(openai_error(error)), _status(error), headers, "application/json")


def _status(error: MillraceError) -> int:
    status, _ = PROBLEMS[str(problem(error)["code"])]
    return BAD_REQUEST if status == UNPROCESSABLE else status


def _type(status: int) -> str:
    return TYPES.get(status, "invalid_request_error" if status in CLIENTS_FAULT else "server_error")


def _param(error: MillraceError) -> str | None:
    match error:
        case InvalidRequest():
            return error.field
        case InvalidFields():
            return error.errors[0].field
    return None
