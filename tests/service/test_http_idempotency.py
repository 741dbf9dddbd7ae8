"""The same key with the same body is the same request, whatever happened to the first answer."""

from dataclasses import replace
from typing import Any

import pytest

from model.request import Request
from service.broker.base import Accepted, IdempotencyKey
from service.errors import Unavailable
from tests.service.helpers_http import Door, FakeBroker, frames_of, say

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": True}, {"background": True}, {"echo": True, "seed": 1}])
async def test_the_same_key_and_body_give_the_same_answer(fields: dict[str, Any]) -> None:
    door = Door(say("hello"))
    first = await door.generate_once("k", **fields)
    other = Door(broker=door.broker)
    again = await other.generate_once("k", **fields)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert len(door.broker.requests) == fields.get("n", 1)
    assert other.books() == {"accepted": 0, "in_flight": 0}
    assert other.num_resumed() == (0 if "background" in fields else 1)
    assert door.num_resumed() == 0


async def test_a_stream_given_again_begins_at_the_start() -> None:
    door = Door(say("hello"))
    first, again = [await door.generate_once("k", stream=True) for _ in range(2)]
    assert frames_of(first.text) == frames_of(again.text)
    assert len(frames_of(first.text)) == 7


async def test_another_body_is_a_conflict() -> None:
    door = Door()
    await door.generate_once("k")
    response = await door.generate_once("k", seed=1)
    assert (response.status_code, response.json()["code"]) == (409, "idempotency_conflict")
    assert (await door.generate_once("other", seed=1)).status_code == 200


async def test_the_same_json_in_other_words_is_the_same_body() -> None:
    door = Door()
    bodies = [b'{"prompt":"hi","seed":1}', b'{ "seed": 1,\n "prompt": "h\\u0069" }']
    for body in bodies:
        await door.ask("POST", "/generate", content=body, headers=JSON | {"Idempotency-Key": "k"})
    assert len(door.broker.requests) == 1


async def test_without_a_key_every_request_is_new() -> None:
    door = Door()
    assert (await door.generate(seed=1)).json()["id"] != (await door.generate(seed=1)).json()["id"]


async def test_neither_key_nor_body_reaches_the_broker() -> None:
    door = Door()
    await door.generate_once("secret")
    ((name, (body, _)),) = door.broker.keys.items()
    assert [len(bytes.fromhex(digest)) for digest in (name, body)] == [32, 32]


@pytest.mark.parametrize("key", ["!", "~" * 255, 'a"b', "4b7c-9"])
async def test_visible_ascii_makes_a_key(key: str) -> None:
    assert (await Door().generate_once(key)).status_code == 200


@pytest.mark.parametrize("key", ["", " ", "a b", "a" * 256, "\u00e9", "a\tb"])
async def test_anything_else_is_refused_by_name(key: str) -> None:
    door = Door()
    headers = [(b"content-type", b"application/json"), (b"idempotency-key", key.encode("latin-1"))]
    response = await door.ask("POST", "/generate", content=b'{"prompt":"hi"}', headers=headers)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert (error["field"], error["allowed"]) == ("Idempotency-Key", "1 to 255 visible ASCII characters")
    assert not door.broker.requests


async def test_two_keys_are_none() -> None:
    headers = [(b"content-type", b"application/json"), (b"idempotency-key", b"a"), (b"idempotency-key", b"b")]
    response = await Door().ask("POST", "/generate", content=b'{"prompt":"hi"}', headers=headers)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "Idempotency-Key")


async def test_a_full_queue_does_not_keep_a_client_from_what_it_has_in_it() -> None:
    door = Door()
    first = await door.generate_once("k")
    door.broker.full = True
    assert (await door.generate_once("k")).content == first.content
    assert (await door.generate()).status_code == 429


class Retrying(FakeBroker):
    """Its reply was lost and the submission sent again: found there, under the id that was just drawn."""

    async def submit(self, group: Any, key: IdempotencyKey | None = None) -> Accepted:
        return replace(await super().submit(group, key), created=False)

    async def lookup(self, id: str, tenant: str) -> tuple[Request, ...]:
        raise AssertionError("it is ours")


async def test_a_submission_that_was_sent_again_is_ours() -> None:
    door = Door(broker=Retrying())
    assert (await door.generate_once("k")).status_code == 200
    assert door.books() == {"accepted": 1, "in_flight": 0, "stop": 1}
    assert door.num_resumed() == 0


async def test_what_can_not_be_found_again_is_a_status() -> None:
    door = Door()
    await door.generate_once("k", stream=True)
    door.broker.requests.clear()
    response = await door.generate_once("k", stream=True)
    assert (response.status_code, response.json()["code"]) == (404, "request_not_found")


async def test_a_queue_that_is_away_is_asked_before_anything_is_tokenised() -> None:
    door = Door()
    door.broker.away = Unavailable("the queue can't be reached", 2)
    response = await door.generate_once("k", prompt=[999])  # would be 422
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
