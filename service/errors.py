"""The error tree. Errors know nothing of HTTP; `http/app.py` maps them to a status, `http/sse.py` to an event.

Every message names the offending value and the limit, and never a path or a traceback.
"""


class MillraceError(Exception):
    """Root of everything that is raised on purpose. `code` is stable and machine-readable."""

    code = "internal_error"


class InvalidRequest(MillraceError):
    """A field that can't be accepted: which, what it held (shortened), and what is allowed."""

    code = "invalid_request"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, _short(value), allowed
        super().__init__(f"{field}: got {self.value}, allowed: {allowed}")


class PromptTooLong(MillraceError):
    """The prompt leaves no room for a single output token."""

    code = "context_length_exceeded"

    def __init__(self, num_prompt_tokens: int, limit: int) -> None:
        self.num_prompt_tokens, self.limit = num_prompt_tokens, limit
        super().__init__(f"the prompt has {num_prompt_tokens} tokens; the limit is {limit}")


class ModelNotFound(MillraceError):
    """The request names a model that is not served here."""

    code = "model_not_found"

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"no model called {_short(name)} is served here; the served one is {served}")


class TaskNotSupported(MillraceError):
    """The served model can't do what the route is for."""

    code = "task_not_supported"

    def __init__(self, task: str, name: str, tasks: tuple[str, ...]) -> None:
        super().__init__(f"the model {name} can't {task}; it can {' and '.join(tasks)}")


class RequestNotFound(MillraceError):
    """No request with that id, for that tenant (the two are not told apart)."""

    code = "request_not_found"


class IdempotencyConflict(MillraceError):
    """The idempotency key belongs to a request with another body."""

    code = "idempotency_conflict"

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key was used with another body; use a new key for a new request")


class Overloaded(MillraceError):
    """The queue is full. `retry_after_s` is when room is expected."""

    code = "overloaded"

    def __init__(self, retry_after_s: int, num_waiting: int) -> None:
        self.retry_after_s, self.num_waiting = retry_after_s, num_waiting
        super().__init__(f"the queue is full with {num_waiting} requests waiting; try again in {retry_after_s} s")


class RateLimited(MillraceError):
    """A key's own limit. `retry_after_s` is when there is room again."""

    code = "rate_limit_exceeded"

    def __init__(self, limit: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the limit of this key is {limit}; try again in {retry_after_s} s")


class Unavailable(MillraceError):
    """Nothing can be served now: loading, draining, or the queue can't be reached."""

    code = "unavailable"

    def __init__(self, why: str, retry_after_s: int = 5) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(why)


class TimedOut(MillraceError):
    """The request's time was up before its end; where an API has no other way to say so."""

    code = "timeout"


class Cancelled(MillraceError):
    """Somebody cancelled the request by its id; where an API has no other way to say so."""

    code = "cancelled"


class Handover(MillraceError):
    """This process stops serving a stream that goes on: whoever reads it shall come back, here or elsewhere."""

    code = "unavailable"

    def __init__(self) -> None:
        super().__init__("this server is shutting down; the request goes on and can be read again by its id")


class StartupError(MillraceError):
    """The program can't start: what is wrong and the next command to type. Printed as one line; exit code 3."""

    code = "startup_error"


def _short(value: object, limit: int = 64) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
