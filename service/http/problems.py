"""The error tree in HTTP's words: RFC 9457 problem objects, for a response's body and for a stream's terminal event.

The one place that knows which error has which status. Nothing from inside the program is told: no path, no traceback.
"""

import orjson
from starlette.responses import Response

from service.errors import Handover, InvalidRequest, MillraceError, Overloaded, PromptTooLong, RateLimited, Unavailable

MEDIA_TYPE = "application/problem+json"
HANDOVER_RETRY_S = 1  # another process serves already, or this one's successor soon

# code -> status, title; the code is the anchor of the error's line on the /docs page
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed": (400, "The body is not JSON"),
    "bad_request": (400, "Not a request that can be read"),
    "task_not_supported": (400, "The model can't do that"),
    "invalid_api_key": (401, "The key is missing or not known"),
    "forbidden": (403, "Not from there"),
    "model_not_found": (404, "No such model"),
    "request_not_found": (404, "No such request"),
    "not_found": (404, "No such route"),
    "method_not_allowed": (405, "The route does not take this method"),
    "too_slow": (408, "The request took too long to arrive"),
    "idempotency_conflict": (409, "The key belongs to another request"),
    "too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body is not in a form that is taken here"),
    "invalid_request": (422, "A field can't be accepted"),
    "context_length_exceeded": (422, "The prompt is too long"),
    "overloaded": (429, "The queue is full"),
    "rate_limit_exceeded": (429, "The key's limit is reached"),
    "headers_too_large": (431, "The headers are too large or too many"),
    "internal_error": (500, "Something broke here"),
    "cancelled": (499, "Cancelled by its id"),
    "unavailable": (503, "Not ready to serve"),
    "timeout": (504, "The time is up"),
}


class HttpRefusal(MillraceError):
    """Refused for a reason that only exists in HTTP. `headers` go with the response."""

    def __init__(self, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        self.code, self.headers = code, headers or {}
        super().__init__(detail)


class InvalidFields(MillraceError):
    """Several fields that can't be accepted, told together."""

    code = "invalid_request"

    def __init__(self, errors: list[InvalidRequest]) -> None:
        self.errors = errors
        super().__init__("; ".join(str(error) for error in errors))


def problem(error: MillraceError) -> dict[str, object]:
    """The problem object: the standard members, `code`, and what a program needs to react."""
    code = error.code if error.code in PROBLEMS else MillraceError.code
    status, title = PROBLEMS[code]
    told: dict[str, object] = {"type": f"/docs#{code}", "title": title, "status": status, "detail": _clean(str(error))}
    told["code"] = code
    match error:
        case InvalidRequest():
            told["errors"] = [_field(error)]
        case InvalidFields():
            told["errors"] = [_field(each) for each in error.errors]
        case PromptTooLong():
            told |= {"num_prompt_tokens": error.num_prompt_tokens, "limit": error.limit}
        case Overloaded():
            told |= {
                "num_waiting": error.num_waiting,
                "position": error.num_waiting + 1,
                "retry_after_s": error.retry_after_s,
            }
    return told


def problem_response(error: MillraceError) -> Response:
    """The problem as a response."""
    body = problem(error)
    return Response(orjson.dumps(body), PROBLEMS[str(body["code"])][0], headers_of(error), MEDIA_TYPE)


def headers_of(error: MillraceError) -> dict[str, str]:
    """What goes with an error: `Retry-After` where trying again makes sense (RFC 9110, section 10.2.3)."""
    headers = dict(error.headers) if isinstance(error, HttpRefusal) else {}
    if isinstance(error, Overloaded | RateLimited | Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, Handover):
        headers["Retry-After"] = str(HANDOVER_RETRY_S)
    return headers


def _field(error: InvalidRequest) -> dict[str, str]:
    return {"field": _clean(error.field), "value": _clean(error.value), "allowed": error.allowed}


def _clean(text: str) -> str:
    """A client may have named a field with half a surrogate pair, which no UTF-8 can carry back."""
    return text.encode("utf-8", "backslashreplace").decode()
