"""From the bytes of a request to a checked schema. Every way of being wrong is a 4xx that says what and what instead.

It knows no route and no model. Python's own JSON reader is used, since it can tell of duplicate keys; numbers that are
not finite get through it and are refused by the schema, by name. What no schema looks at is safe all the same for
whoever writes it down again: no half of a surrogate pair, no integer beyond 64 bits, no endless nesting.
"""

import difflib
import json
import re
from collections import Counter
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from service.errors import InvalidRequest
from service.http.problems import HttpRefusal, InvalidFields

MAX_BODY_BYTES = 4 * 2**20
MAX_ERRORS = 10  # told at once
MAX_DEPTH = 64  # of lists and objects in each other
SUSPECT = re.compile(rb"\\u[dD]|[0-9]{19}")  # what a surrogate or an integer beyond 64 bits can't do without
INTEGERS = range(-(2**63), 2**64)

Schema = TypeVar("Schema", bound=BaseModel)


async def read_json(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> object:
    """The body, counted while it arrives. Raises `HttpRefusal` or `InvalidRequest`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpRefusal("unsupported_media_type", "send the body with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpRefusal("unsupported_media_type", "send the body without Content-Encoding")
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    if not (announced.isascii() and announced.isdigit() and len(announced) <= 20 and int(announced) <= limit_bytes):
        raise _too_large(limit_bytes)
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
    return _parse(bytes(body))


def _too_large(limit_bytes: int) -> HttpRefusal:
    # the rest of the body is not read, so the connection can't carry another request
    return HttpRefusal("too_large", f"the limit is {limit_bytes} bytes", {"Connection": "close"})


def _parse(body: bytes) -> object:
    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=_once_each)
    except UnicodeDecodeError as error:
        raise HttpRefusal("malformed", f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise HttpRefusal("malformed", f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError):
        raise HttpRefusal("malformed", "a number is too long, or the nesting too deep") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deep(data):
        raise HttpRefusal("malformed", f"the nesting is too deep; the limit is {MAX_DEPTH}")
    if SUSPECT.search(body):
        for name, value in data.items() if isinstance(data, dict) else [("body", data)]:
            _check_values(name, value)
    return data


def _is_deep(data: object) -> bool:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)


def _check_values(name: str, value: object) -> None:
    """All that is in a field, its name included."""
    todo = [name, value]
    while todo:
        match todo.pop():
            case str() as text if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise InvalidRequest(name[:64], text, "text without halves of surrogate pairs") from None
            case bool():
                pass
            case int() as number if number not in INTEGERS:
                raise InvalidRequest(name[:64], number, "integers of at most 64 bits")
            case dict() as items:
                todo += [*items.keys(), *items.values()]
            case list() as items:
                todo += items


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise InvalidRequest(twice[:64], "given twice", "every key once")
    return found


def check(schema: type[Schema], data: object, allowed: dict[str, str]) -> Schema:
    """`data` as `schema`. Raises `InvalidRequest` or `InvalidFields`, quoting `allowed` by field."""
    if not isinstance(data, dict):
        raise InvalidRequest("body", data, "a JSON object")
    unknown = [key for key in data if key not in schema.model_fields]
    if unknown:
        raise InvalidFields([_unknown(key, data[key], schema) for key in unknown[:MAX_ERRORS]])
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        names = list(dict.fromkeys(str(detail["loc"][0]) for detail in details))[:MAX_ERRORS]
        raise InvalidFields([InvalidRequest(name, data.get(name), allowed[name]) for name in names]) from None


def _unknown(key: str, value: object, schema: type[BaseModel]) -> InvalidRequest:
    near = difflib.get_close_matches(key[:64], schema.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known fields are {', '.join(schema.model_fields)}"
    return InvalidRequest(key[:64], value, f"no such field; {hint}")
