"""What the door refuses, and how it says so."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.http.schemas import ALLOWED, GenerateRequest
from tests.service.helpers_http import Door

BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "temperature": (0, 2),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.001, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
    "n": (1, 8),
    "timeout_s": (0.001, 86400),
    "queue_timeout_s": (0.001, 86400),
    "priority": (-1, 0),
}
NULLABLE = {"model", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "seed"} | {
    "stop",
    "stop_token_ids",
    "logprobs",
    "timeout_s",
    "queue_timeout_s",
    "response_format",
    "regex",
    "grammar",
    "cache_salt",
}
ODD = [0, -1, 1, 1.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.0, "1", "", "\ud800", True, None]
ODD += [[], {}, [1], [-1], [256], [True], ["a"] * 17, [[]], {"7": 1}, {"07": 1}, {"256": 1}, {"1e3": 1}, {"\ud800": 1}]

SHARED = Door()


async def test_every_bound_is_where_the_answer_says_it_is() -> None:
    door = Door()
    for name, (low, high) in BOUNDS.items():
        others = {"max_tokens": 2**31 - 1} if name == "min_tokens" else {}
        for value, status in ((low, 200), (high, 200), (low - 1, 422), (high + 1, 422)):
            response = await door.generate(**others | {name: value})
            assert response.status_code == status, f"{name}={value}: {response.text}"
            if status == 422:
                assert response.headers["content-type"] == "application/problem+json"
                (error,) = response.json()["errors"]
                assert error == {"field": name, "value": repr(value), "allowed": ALLOWED[name]}


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*ALLOWED, "unknown"]), st.sampled_from(ODD), max_size=3))
async def test_no_value_in_any_field_is_the_servers_fault(fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "hi"} | fields)  # lets NaN and Infinity through
    response = await SHARED.ask("POST", "/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 202, 404, 422), response.text
    if response.status_code > 202:
        assert response.json()["code"] in ("invalid_request", "model_not_found", "context_length_exceeded")


@pytest.mark.parametrize("name", sorted(set(GenerateRequest.model_fields) - NULLABLE))
@pytest.mark.parametrize("value", [None, "1", [None]])
async def test_wrong_types_are_refused_never_converted(name: str, value: object) -> None:
    if (name, value) == ("prompt", "1"):
        return
    response = await Door().generate(**{name: value})
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["errors"]] == [name]


@pytest.mark.parametrize("name", sorted(NULLABLE))
async def test_null_means_absent_where_absence_means_something(name: str) -> None:
    assert (await Door().generate(**{name: None})).status_code == 200


async def test_an_integer_will_do_for_a_number_but_a_boolean_will_not() -> None:
    assert (await Door().generate(temperature=1)).status_code == 200
    assert (await Door().generate(temperature=True)).status_code == 422
    assert (await Door().generate(n=True)).status_code == 422
    assert (await Door().generate(n=1.0)).status_code == 422


async def test_an_unknown_field_is_refused_with_the_likely_one() -> None:
    (error,) = (await Door().generate(temperatur=1)).json()["errors"]
    assert error["field"] == "temperatur"
    assert "did you mean temperature?" in error["allowed"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"prompt": "a", "prompt": "b"}', 422, "invalid_request"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', 422, "invalid_request"),
        (b'{"prompt": "a", "temperature": NaN}', 422, "invalid_request"),
        (b'{"prompt": "a", "temperature": 1e400}', 422, "invalid_request"),
        (b'{"prompt": "\\ud800"}', 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b'{"prompt": "a"', 400, "malformed"),
        (b"", 400, "malformed"),
        (b'{"prompt": "\xff"}', 400, "malformed"),
        (b"[" * 100_000, 400, "malformed"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "malformed"),
        (b'{"prompt": "' + b"a" * 2**22 + b'"}', 413, "too_large"),
    ],
)
async def test_bodies_that_are_not_what_they_should_be(body: bytes, status: int, code: str) -> None:
    response = await Door().ask("POST", "/generate", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert len(response.content) < 2000


async def test_a_body_is_counted_while_it_arrives() -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 2**16

    response = await Door().ask("POST", "/generate", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {}, {"Content-Type": "application/json", "Content-Encoding": "gzip"}],
)
async def test_only_plain_json_is_taken(headers: dict[str, str]) -> None:
    response = await Door().ask("POST", "/generate", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {f"x{i}": 1 for i in range(1000)}},
        {"prompt": ["a"] * 1000},
        {"stop": [""] * 1000},
        {"stop_token_ids": [-1] * 1000},
    ],
)
def test_a_thousand_mistakes_make_a_few_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        GenerateRequest.model_validate({"prompt": "hi"} | fields)
    assert refusal.value.error_count() <= 2


async def test_a_thousand_unknown_fields_are_told_in_a_few_lines() -> None:
    response = await Door().generate(**{f"x{i}": 1 for i in range(1000)})
    assert len(response.json()["errors"]) == 10
