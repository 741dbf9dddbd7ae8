"""Two thousand requests made from /openapi.json, such as fit it and such as don't, and some hundreds that are spoilt
HTTP: nothing is the server's fault, nothing of the inside is told. `make fuzz` tries many more on a real server."""

import asyncio
import random
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from loadtests.fuzz.raw import attack, spoilt
from loadtests.fuzz.schema import Arm, Ask, arms, complaint
from model.request import Request
from service.broker.base import Entry
from service.http.app import create_app
from service.http.gate import Rules
from service.keys import Keyring, add_key
from tests.service.helpers_http import SERVED, STOP, Door, say
from tests.service.test_protocol import house

API = asyncio.run(Door().ask("GET", "/openapi.json")).json()
ARMS = {arm.name: arm for arm in arms(API)}
ABLE = replace(SERVED, tasks=("generate", "embed", "classify"), labels=("a", "b", "c"), hidden_size=3)
WITH_BODY, WITHOUT = 70, 90  # cases of each; the former are dear to make


def num_cases(arm: Arm) -> int:
    return WITH_BODY if arm.has_body else WITHOUT


def test_there_are_two_thousand() -> None:
    assert sum(map(num_cases, ARMS.values())) >= 2000


@pytest.mark.filterwarnings("ignore")  # of libraries that make the cases
@pytest.mark.parametrize("name", sorted(ARMS))
async def test_no_request_is_the_servers_fault(name: str, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "ada")
    door = Door(answer)
    door.backend.loaded(ABLE, door.broker)
    door.app = create_app(door.backend, door.metrics, rules=Rules(keyring=Keyring(tmp_path / "keys.json")))
    for number, ask in enumerate(ARMS[name].batch(num_cases(ARMS[name]), 1)):
        allowed = {"authorization": f"Bearer {key}"} if number % 10 else {}  # now and then, nobody
        status, body = await send(door, ask, allowed)
        assert complaint(ask, status, body) is None
        assert allowed or status == 401 or ask.target.startswith(("/health", "/ready"))


def test_what_counts_as_the_servers_fault() -> None:
    ask = Ask("POST", "/generate", {}, b'{"seed": "helper_.py"}')
    assert complaint(ask, 422, b'{"detail": "seed: got \'helper_.py\'"}') is None
    assert complaint(ask, 422, b'{"detail": "service/http/reply.py, line 3"}')
    assert complaint(ask, 422, b"Traceback (most recent call last)")
    assert complaint(ask, 500, b"{}")


def answer(request: Request) -> Iterable[Entry | Exception | None]:
    """Text where there is some to come, else three numbers."""
    if request.task == "generate":
        return say("hello")(request)
    return [Entry(0, finish=STOP, result=struct.pack("<3f", 0.25, 0.5, 0.25))]


async def send(door: Door, ask: Ask, more: dict[str, str]) -> tuple[int, bytes]:
    """Past the network: what a server would make of it."""
    path, _, query = ask.target.partition("?")
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    headers = {"host": "localhost", **ask.headers, **more}
    scope |= {
        "method": ask.method,
        "path": path_of(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        "scheme": "http",
        "root_path": "",
        "server": ("localhost", 80),
        "client": ("localhost", 1),
    }
    sent: list[Any] = []
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": ask.body, "more_body": False})

    async def keep(message: Any) -> None:
        sent.append(message)

    await door.app(scope, inbox.get, keep)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def path_of(path: str) -> str:
    """As uvicorn decodes it."""
    return unquote(path)


async def test_spoilt_http_is_refused_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEAD_S": 0.5, "BODY_S": 0.5, "LINGER_S": 0.2}.items():
        monkeypatch.setattr(f"service.http.protocol.{name}", value)
    async with house(max_connections=200) as served:
        told = await attack(served.port, "mr-key", 500, seed=1, per_s=1000, at_once=100)
        assert not told["complaints"]
        assert b"200" in await served.say(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


def test_the_same_seed_spoils_the_same() -> None:
    assert spoilt(random.Random(7)) == spoilt(random.Random(7))
