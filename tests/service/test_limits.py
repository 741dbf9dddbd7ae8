"""What a key may do at a time and in a minute, and how it is told."""

import asyncio
from pathlib import Path

import pytest

from service.errors import RateLimited
from service.http.app import create_app
from service.http.gate import Rules
from service.http.limits import Accounts, Bucket, Visit
from service.keys import Keyring, Tenant, add_key
from tests.service.helpers_broker import FakeClock
from tests.service.helpers_http import Door, Visitor, hang


def tenant(**limits: int) -> Tenant:
    return Tenant(name="ada", keys=("0" * 64,), **limits)


class LimitedDoor(Door):
    """One whose only key has these limits."""

    def __init__(self, folder: Path, **limits: int) -> None:
        super().__init__(hang() if "max_concurrent" in limits else None)
        self.headers = {"Authorization": f"Bearer {add_key(folder / 'keys.json', 'ada', **limits)}"}
        self.app = create_app(self.backend, self.metrics, rules=Rules(keyring=Keyring(folder / "keys.json")))

    async def visit(self, **fields: object):  # type: ignore[no-untyped-def]  # a response
        return await self.ask("POST", "/generate", json={"prompt": "hi", **fields}, headers=self.headers)


def test_a_bucket_fills_in_a_minute_and_holds_no_more() -> None:
    clock = FakeClock()
    bucket = Bucket(60, clock)
    assert (bucket.left(), bucket.wait_s(60)) == (60, 0)
    bucket.take(60)
    assert (bucket.left(), bucket.wait_s(1), bucket.wait_s(60)) == (0, 1, 60)
    clock.advance(30)
    assert bucket.left() == pytest.approx(30)
    clock.advance(600)
    assert bucket.left() == 60


def test_more_than_a_minutes_worth_is_given_to_whoever_took_nothing_for_a_minute() -> None:
    clock = FakeClock()
    bucket = Bucket(60, clock)
    assert bucket.wait_s(600) == 0
    bucket.take(600)
    assert bucket.wait_s(1) == 541
    bucket.take(-1000)
    assert bucket.left() == 60


def test_tokens_that_were_not_used_are_given_back() -> None:
    account = Accounts(FakeClock()).of(tenant(tokens_per_minute=1000))
    visit = Visit(account)
    visit.enter()
    visit.reserve(900)
    with pytest.raises(RateLimited, match="1000 tokens a minute") as refusal:
        Visit(account).reserve(200)
    assert refusal.value.retry_after_s == 6
    visit.used = lambda: 30
    visit.leave()
    visit.leave()
    assert account.tokens is not None and account.tokens.left() == 970


def test_what_goes_on_without_its_reader_keeps_what_was_reserved() -> None:
    account = Accounts(FakeClock()).of(tenant(tokens_per_minute=1000))
    visit = Visit(account)
    visit.reserve(900)
    visit.leave()
    assert account.tokens is not None and account.tokens.left() == 100


def test_new_limits_hold_at_once_and_open_requests_still_count() -> None:
    accounts = Accounts(FakeClock())
    Visit(accounts.of(tenant(max_concurrent=2))).enter()
    account = accounts.of(tenant(max_concurrent=1))
    with pytest.raises(RateLimited, match="1 requests at a time"):
        Visit(account).enter()


async def test_requests_beyond_a_minutes_are_refused_with_what_is_left(tmp_path: Path) -> None:
    door = LimitedDoor(tmp_path, requests_per_minute=2)
    told = [await door.visit() for _ in range(3)]
    assert [response.status_code for response in told] == [200, 200, 429]
    assert [response.headers["x-ratelimit-remaining-requests"] for response in told] == ["1", "0", "0"]
    assert told[2].headers["x-ratelimit-limit-requests"] == "2"
    assert told[2].headers["x-ratelimit-reset-requests"].endswith("s")
    assert 1 <= int(told[2].headers["retry-after"]) <= 30
    assert told[2].json()["code"] == "rate_limit_exceeded"
    assert "x-ratelimit-limit-tokens" not in told[2].headers
    assert len(door.broker.requests) == 2


async def test_tokens_are_charged_as_they_were_used(tmp_path: Path) -> None:
    door = LimitedDoor(tmp_path, tokens_per_minute=100)
    response = await door.visit(max_tokens=50)
    used = response.json()["usage"]["total_tokens"]
    later = await door.ask("GET", "/v1/models", headers=door.headers)
    assert int(later.headers["x-ratelimit-remaining-tokens"]) in (100 - used, 101 - used)
    statuses = {(await door.visit(max_tokens=60, n=8)).status_code for _ in range(2)}
    assert statuses == {429}


async def test_looking_and_cancelling_are_not_limited(tmp_path: Path) -> None:
    door = LimitedDoor(tmp_path, requests_per_minute=1)
    url = f"/generate/{(await door.visit()).json()['id']}"
    assert (await door.visit()).status_code == 429
    for method, path, status in (("GET", url, 200), ("DELETE", url, 202), ("GET", "/v1/models", 200)):
        assert (await door.ask(method, path, headers=door.headers)).status_code == status


async def test_requests_at_a_time_are_counted_until_they_end_however_they_do(tmp_path: Path) -> None:
    door = LimitedDoor(tmp_path, max_concurrent=1)
    for stream in (True, False):
        visitor = Visitor(door.app, stream=stream)
        visitor.headers = [(b"authorization", door.headers["Authorization"].encode())]
        door.broker.waiting.clear()
        visiting = asyncio.create_task(visitor.visit())
        await door.broker.waiting.wait()
        refusal = await door.visit()
        assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "1")
        visitor.leave()
        await visiting
    assert (await door.visit(prompt="")).status_code == 422  # and one that is refused leaves no trace
    assert (await door.visit(prompt="")).status_code == 422
