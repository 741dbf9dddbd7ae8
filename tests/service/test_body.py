"""From bytes to JSON that is safe to keep: depth, integers, surrogates, duplicates. And every number of every schema
has two ends, which hold."""

import importlib
import json
import math
import pkgutil
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

import service.http
from service.errors import InvalidRequest
from service.http.body import MAX_DEPTH, _parse
from service.http.problems import HttpRefusal, problem
from tests.service.helpers_http import Door

STRANGE = [0, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e308, math.nan, math.inf, "1", True, [1], {}]


def nested(depth: int) -> bytes:
    return b'{"a":[' * (depth // 2) + b"1" + b"]}" * (depth // 2)


def test_nesting_has_a_limit() -> None:
    assert _parse(nested(MAX_DEPTH))
    assert _parse(b"[" + b"[]," * 10_000 + b"[]]")
    for depth in (MAX_DEPTH + 2, 900, 100_000):
        with pytest.raises(HttpRefusal):
            _parse(nested(depth))


@pytest.mark.parametrize(
    "value",
    [
        '"\\ud800"',
        '"\\uDFFF"',
        '["\\udc00\\ud800"]',
        '{"\\ud800": 1}',
        '{"a": [{"b": "x\\ud83d"}]}',
        "18446744073709551616",
        "-9223372036854775809",
        "[[99999999999999999999999999]]",
    ],
)
@pytest.mark.parametrize("frame", ['{{"field": {}}}', "{}"])
def test_what_can_not_be_written_down_again_is_refused_wherever_it_is(frame: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        _parse(frame.format(value).encode())
    orjson.dumps(problem(refusal.value))


@pytest.mark.parametrize(
    "value",
    ['"\\ud83d\\ude00"', '"\\\\ud800"', "18446744073709551615", "-9223372036854775808", "1" * 19, "1e400", "true"],
)
def test_what_only_looks_like_it_is_taken(value: str) -> None:
    data = _parse(b'{"field": %b}' % value.encode())
    assert data == json.loads(f'{{"field": {value}}}')
    orjson.dumps(data)


@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "x": "\\ud800"}',
        b'{"prompt": "a", "stop": ["\\udfff"]}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "user": 1' + b"0" * 60 + b"}",
        b'{"prompt": "a", "user": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt": "a", "metadata": {"\\ud800": 1}}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a\\udc00"}]}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": "\\ud800"}]}',
    ],
)
async def test_no_route_breaks_on_it_and_with_an_idempotency_key_neither(route: str, body: bytes) -> None:
    for key in ({}, {"Idempotency-Key": "k"}):
        headers = {"Content-Type": "application/json", **key}
        response = await Door().ask("POST", route, content=body, headers=headers)
        assert 400 <= response.status_code < 500, response.text


# --- numbers ---------------------------------------------------------------------------------------------------------


def numeric_fields() -> Iterator[tuple[str, FieldInfo, type[BaseModel]]]:
    """Every number in every strict schema of this room: those are what clients send."""
    for module in pkgutil.iter_modules(service.http.__path__):
        for schema in vars(importlib.import_module(f"service.http.{module.name}")).values():
            if isinstance(schema, type) and issubclass(schema, BaseModel) and schema.model_config.get("strict"):
                for name, field in schema.model_fields.items():
                    if any(each.get("type") in ("integer", "number") for each in options(adapter(field))):
                        yield f"{schema.__name__}.{name}", field, schema


def adapter(field: FieldInfo) -> TypeAdapter[Any]:
    """One field alone, by the rules of its schema."""
    annotation: Any = field.rebuild_annotation()
    bare = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return TypeAdapter(annotation, config=None if bare else ConfigDict(strict=True, allow_inf_nan=False))


def options(of: TypeAdapter[Any]) -> list[dict[str, Any]]:
    try:
        told = of.json_schema()
    except Exception as error:  # what has no JSON schema is no number
        assert "JsonSchema" in type(error).__name__
        return []
    return [told, *told.get("anyOf", [])]


NUMERIC = {name: (field, schema) for name, field, schema in numeric_fields()}


def test_there_are_numbers_to_look_at() -> None:
    assert {"GenerateRequest.max_tokens", "GenerateRequest.temperature"} <= set(NUMERIC)


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_every_number_has_two_ends_that_hold(name: str) -> None:
    of = adapter(NUMERIC[name][0])
    (number,) = [each for each in options(of) if each.get("type") in ("integer", "number")]
    low, high = (number.get("minimum", number.get("exclusiveMinimum")), number.get("maximum"))
    assert low is not None and high is not None, f"{name} has no bounds: {number}"
    open_low = "exclusiveMinimum" in number
    kind = int if number["type"] == "integer" else float
    for value, ok in ((low, not open_low), (high, True), (low - 1, False), (high + 1, False)):
        assert accepts(of, kind(value)) is ok, (name, value)
    for value in STRANGE:
        inside = type(value) in (int, float) and low <= value <= high and not (open_low and value == low)
        fitting = inside and (kind is float or isinstance(value, int))
        if not isinstance(value, str | list | dict):  # the field may have other forms, which are not numbers
            assert accepts(of, value) is fitting, (name, value)


def accepts(of: TypeAdapter[Any], value: object) -> bool:
    try:
        of.validate_python(value)
    except ValidationError:
        return False
    return True
