"""A request that was submitted before, as a client names it: by its id or its idempotency key, from a position in it,
as a stream or whole.

It parses and looks up; it follows nothing and shapes no answer. Positions are counts of tokens, one for each choice.
"""

import hashlib
import json
import re

from starlette.requests import Request

from service.broker.base import IdempotencyKey, RequestSide
from service.errors import InvalidRequest, RequestNotFound
from service.http.intake import Intake, Served
from service.http.schemas import MAX_COUNT

KEY, LAST_EVENT = "Idempotency-Key", "Last-Event-ID"  # headers
AFTER, STREAM, PROGRESS = "after", "stream", "progress"  # query parameters
VISIBLE = re.compile(r"[!-~]{1,255}")
ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")
COUNT = re.compile(r"0|[1-9][0-9]{0,9}")
ALLOWED_KEY = "1 to 255 visible ASCII characters"
ALLOWED_COUNTS = f"a count of tokens from 0 to {MAX_COUNT}, or one for each choice with commas between"
NOT_WHOLE = "none where the whole answer is asked for"
SWITCH = {"true": True, "false": False}


def idempotency_key(request: Request, body: object) -> IdempotencyKey | None:
    """The key that came with a body, None if none did. Bodies are the same if they are the same JSON, whatever the
    order and the spaces. `body` has passed the schema. Raises `InvalidRequest`."""
    given = request.headers.getlist(KEY)
    if not given:
        return None
    key = ", ".join(given)  # as a proxy may join them; two are refused for the space
    if not VISIBLE.fullmatch(key):
        raise InvalidRequest(KEY, key, ALLOWED_KEY)
    canonical = json.dumps(body, sort_keys=True)  # which takes what a field may hold that nobody reads: any number
    return IdempotencyKey(hashlib.sha256(key.encode()).hexdigest(), hashlib.sha256(canonical.encode()).hexdigest())


async def admitted(broker: RequestSide, taken: Intake, key: IdempotencyKey | None, served: Served) -> Intake:
    """Submit. What comes back is `taken` itself, or what the key stood for already. Raises what `submit` and `lookup`
    raise."""
    accepted = await broker.submit(taken.group, key)
    if accepted.created or accepted.id == taken.id:  # the latter: a submission that was sent again
        return taken
    return await stored(broker, accepted.id, taken.group[0].tenant, served)


def check_id(id: str) -> str:
    """What a client sends as an id, before anybody looks for it or repeats it. Raises `RequestNotFound`."""
    if not ID.fullmatch(id):
        raise RequestNotFound("no request has an id like that")
    return id


async def stored(broker: RequestSide, id: str, tenant: str, served: Served) -> Intake:
    """The request of an id. One of another model is none of ours: its text can't be made here. Raises
    `RequestNotFound` and `Unavailable`."""
    group = await broker.lookup(check_id(id), tenant)
    if group[0].model != served.name:
        raise RequestNotFound(f"request {id} is not of the model that is served here, {served.name}")
    return Intake(group)


def reading(request: Request, intake: Intake) -> tuple[int, ...] | None:
    """How a stored request is to be read: as a stream after these counts, from the header, else the parameter, else
    from the start; None is the whole answer. Raises `InvalidRequest`."""
    header, parameter = request.headers.getlist(LAST_EVENT), request.query_params.getlist(AFTER)
    if not _wants_stream(request):
        if header or parameter:
            raise InvalidRequest(LAST_EVENT if header else AFTER, ", ".join(header or parameter), NOT_WHOLE)
        return None
    if header:
        allowed = f"{intake.id}: and {ALLOWED_COUNTS}"
        id, _, counts = header[0].rpartition(":")
        if len(header) > 1 or id != intake.id:
            raise InvalidRequest(LAST_EVENT, ", ".join(header), allowed)
        return _counts(LAST_EVENT, header[0], counts, len(intake.group), allowed)
    if parameter:
        given = ",".join(parameter)
        return _counts(AFTER, given, given, len(intake.group), ALLOWED_COUNTS)
    return (0,) * len(intake.group)


def _counts(field: str, value: str, text: str, num_choices: int, allowed: str) -> tuple[int, ...]:
    parts = text.split(",", num_choices)
    if len(parts) not in (1, num_choices) or not all(COUNT.fullmatch(part) for part in parts):
        raise InvalidRequest(field, value, allowed)
    counts = tuple(map(int, parts))
    if max(counts) > MAX_COUNT:
        raise InvalidRequest(field, value, allowed)
    return counts if len(counts) == num_choices else counts * num_choices


def wants_progress(request: Request) -> bool:
    """Whether a stream shall tell how its request stands. Raises `InvalidRequest`."""
    return bool(switch(request, PROGRESS))


def switch(request: Request, name: str) -> bool | None:
    """A parameter that is true or false; None if it is absent. Raises `InvalidRequest`."""
    given = request.query_params.getlist(name)
    if given and ",".join(given) not in SWITCH:
        raise InvalidRequest(name, ",".join(given), "true or false")
    return SWITCH[",".join(given)] if given else None


def _wants_stream(request: Request) -> bool:
    """As the parameter says, else by `Accept`, else yes."""
    wanted = switch(request, STREAM)
    if wanted is not None:
        return wanted
    accepted = request.headers.get("accept", "")
    return "application/json" not in accepted or "text/event-stream" in accepted
