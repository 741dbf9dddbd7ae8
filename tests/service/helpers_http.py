"""The door without anything behind it: a byte tokenizer, a broker that plays a script, and ways to knock."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from model.config import GenerationDefaults
from model.request import Finish, FinishReason, Request
from model.tokenizer import Tokenizer
from service.broker.base import Accepted, Entry, QueueLoad
from service.http.app import create_app
from service.http.intake import Served
from service.http.routes import Backend
from service.metrics import Metrics

STOP, LENGTH = Finish(FinishReason.STOP), Finish(FinishReason.LENGTH)
Script = Callable[[Request], Iterable[Entry | Exception | None]]


def byte_tokenizer() -> Tokenizer:
    """256 ids, one for each byte; nothing is added to a raw prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


TOKENIZER = byte_tokenizer()
SERVED = Served("tiny", TOKENIZER, 64, 256, (0,), GenerationDefaults(temperature=0.5), created=1_700_000_000)


def say(text: str, finish: Finish = STOP) -> Script:
    """One entry for each token of a text, the last with the finish."""
    ids = TOKENIZER.encode(text)
    entries = [Entry(i, (token_id,)) for i, token_id in enumerate(ids[:-1])]
    return lambda request: [*entries, Entry(len(ids) - 1, (ids[-1],), finish=finish, queue_s=0.25)]


def hang(*entries: Entry) -> Script:
    """Some entries, and then nothing."""
    return lambda request: [*entries, None]


@dataclass
class FakeBroker:
    """Plays `script` to whoever follows: entries, errors to raise, None to wait for ever."""

    script: Script = field(default_factory=lambda: say("hello"))
    full: bool = False
    refusal: Exception | None = None
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)  # somebody waits for ever

    async def submit(self, group: Sequence[Request]) -> Accepted:
        if self.refusal is not None:
            raise self.refusal
        self.requests += group
        return Accepted(group[0].id)

    async def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        for entry in self.script(next(request for request in self.requests if request.id == id)):
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                self.waiting.set()
                await asyncio.Event().wait()
            else:
                yield entry

    async def cancel(self, id: str, tenant: str) -> None:
        self.cancelled.append(id)

    async def load(self) -> QueueLoad:
        return QueueLoad(num_waiting=7, num_running=2, oldest_wait_s=1.0, full=self.full, retry_after_s=3)


class Door:
    """An application over a fake broker, and a client of it."""

    def __init__(self, script: Script | None = None, *, loaded: bool = True) -> None:
        self.broker = FakeBroker() if script is None else FakeBroker(script)
        self.metrics, self.backend = Metrics(), Backend()
        if loaded:
            self.backend.loaded(SERVED, self.broker)
        self.app: FastAPI = create_app(self.backend, self.metrics)

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    async def generate(self, prompt: object = "hi", **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/generate", json={"prompt": prompt, **fields})

    async def stream(self, prompt: object = "hi", **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, `[DONE]` checked and left out."""
        response = await self.generate(prompt, stream=True, **fields)
        assert response.status_code == 200, response.text
        return events_of(response.text)

    def books(self) -> dict[str, float]:
        """Accepted, in flight and each outcome that occurred."""
        value = self.metrics.registry.get_sample_value
        outcomes = {r.value: value("millrace_requests_ended_total", {"outcome": r.value}) or 0 for r in FinishReason}
        accepted = value("millrace_requests_accepted_total") or 0
        in_flight = value("millrace_requests_in_flight") or 0
        assert accepted == in_flight + sum(outcomes.values())
        return {"accepted": accepted, "in_flight": in_flight} | {k: n for k, n in outcomes.items() if n}


def events_of(text: str) -> list[dict[str, Any]]:
    """Data events as dicts with their event id under `event_id`; the last frame must be `[DONE]`."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = []
    for frame in frames[:-2]:
        if frame.startswith(":"):
            continue
        id_line, data_line = frame.split("\n")
        event = json.loads(data_line.removeprefix("data: "))
        events.append(event | {"event_id": id_line.removeprefix("id: ").partition(":")[2]})
    return events


class Visitor:
    """An ASGI client that sends one body, and leaves when `leave` is called or after so many messages."""

    leave_after = 0

    def __init__(self, app: FastAPI, **fields: Any) -> None:
        self._app, self._body = app, json.dumps({"prompt": "hi", **fields}).encode()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": self._body, "more_body": False})
        self.sent: list[dict[str, Any]] = []

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) == self.leave_after:
            self.leave()

    async def visit(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/generate",
            "raw_path": b"/generate",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await self._app(scope, self._inbox.get, self._send)
