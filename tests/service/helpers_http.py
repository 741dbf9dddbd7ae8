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
from service.broker.base import Accepted, Books, Entry, Glance, IdempotencyKey, QueueLoad, Timings
from service.broker.log import Log
from service.errors import IdempotencyConflict, RequestNotFound
from service.http.app import create_app
from service.http.backend import Backend
from service.http.intake import Served
from service.metrics import OUTCOMES, Metrics

STOP, LENGTH = Finish(FinishReason.STOP), Finish(FinishReason.LENGTH)
TIMINGS = Timings(0.25, 0.5, 1.5)
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


def say(text: str, finish: Finish = STOP, num_cached: int = 0) -> Script:
    """One entry for each token of a text, the last with the finish."""
    ids = TOKENIZER.encode(text)
    entries = [Entry(i, (token_id,)) for i, token_id in enumerate(ids[:-1])]
    end = Entry(len(ids) - 1, (ids[-1],), finish=finish, timings=TIMINGS, num_cached=num_cached)
    return lambda request: [*entries, end]


def hang(*entries: Entry) -> Script:
    """Some entries, and then nothing."""
    return lambda request: [*entries, None]


@dataclass
class FakeBroker:
    """Plays `script` to whoever follows: entries, errors to raise, None to wait for ever. Keeps what was submitted. Who
    looks finds what is played up to the first wait, and what `position` says."""

    script: Script = field(default_factory=lambda: say("hello"))
    full: bool = False
    refusal: Exception | None = None
    away: Exception | None = None
    requests: list[Request] = field(default_factory=list)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # of a body, and the group that it made
    num_loads: int = 0
    num_looks: int = 0
    position: int | None = None
    cancelled: list[str] = field(default_factory=list)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)  # somebody waits for ever

    async def submit(self, group: Sequence[Request], key: IdempotencyKey | None = None) -> Accepted:
        if self.refusal is not None:
            raise self.refusal
        id = group[0].group
        if key is not None:
            body, known = self.keys.setdefault(key.name, (key.body, id))
            if body != key.body:
                raise IdempotencyConflict
            if known != id:
                return Accepted(known, created=False)
        self.requests += group
        return Accepted(id)

    async def lookup(self, id: str, tenant: str) -> tuple[Request, ...]:
        group = tuple(request for request in self.requests if (request.group, request.tenant) == (id, tenant))
        if not group:
            raise RequestNotFound(f"no request {id}")
        return group

    async def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        for entry in self.script(next(request for request in self.requests if request.id == id)):
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                self.waiting.set()
                await asyncio.Event().wait()
            else:
                yield entry

    async def peek(self, id: str, tenant: str) -> Glance:
        self.num_looks += 1
        found = [request for request in self.requests if (request.id, request.tenant) == (id, tenant)]
        if not found:
            raise RequestNotFound(f"no request {id}")
        log = Log()
        for entry in self.script(found[0]):
            if not isinstance(entry, Entry):
                break
            log.append(entry)
        return Glance(log.since(0), self.position)

    async def cancel(self, id: str, tenant: str) -> None:
        self.cancelled.append(id)

    async def load(self) -> QueueLoad:
        self.num_loads += 1
        if self.away is not None:
            raise self.away
        return QueueLoad(num_waiting=7, num_running=2, oldest_wait_s=1.0, full=self.full, retry_after_s=3)

    async def books(self) -> Books:
        await self.load()
        return Books(7, 2, 1.0, 9, {})


class Door:
    """An application over a fake broker, and a client of it. Two over one broker are two processes."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        loaded: bool = True,
        broker: FakeBroker | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.broker = broker or (FakeBroker() if script is None else FakeBroker(script))
        self.metrics, self.backend = Metrics(), backend or Backend()
        if loaded:
            self.backend.loaded(SERVED, self.broker)
        self.app: FastAPI = create_app(self.backend, self.metrics)

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    async def generate(self, prompt: object = "hi", **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/generate", json={"prompt": prompt, **fields})

    async def generate_once(self, key: str, **fields: Any) -> httpx.Response:
        """With an idempotency key."""
        body = {"prompt": "hi", **fields}
        return await self.ask("POST", "/generate", json=body, headers={"Idempotency-Key": key})

    async def read(self, after: str | None = None, **headers: str) -> httpx.Response:
        """The request that was submitted last, again."""
        url = f"/generate/{self.broker.requests[-1].group}"
        return await self.ask("GET", url, params={} if after is None else {"after": after}, headers=headers)

    async def stream(self, prompt: object = "hi", **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, `[DONE]` checked and left out."""
        response = await self.generate(prompt, stream=True, **fields)
        assert response.status_code == 200, response.text
        return events_of(response.text)

    def num_resumed(self) -> float:
        """Readers of requests that were there before."""
        return self.metrics.registry.get_sample_value("millrace_streams_resumed_total") or 0

    def books(self) -> dict[str, float]:
        """Accepted, in flight and each outcome that occurred."""
        value = self.metrics.registry.get_sample_value
        outcomes = {name: value("millrace_requests_ended_total", {"outcome": name}) or 0 for name in OUTCOMES}
        accepted = value("millrace_requests_accepted_total") or 0
        in_flight = value("millrace_requests_in_flight") or 0
        assert accepted == in_flight + sum(outcomes.values())
        return {"accepted": accepted, "in_flight": in_flight} | {k: n for k, n in outcomes.items() if n}


def frames_of(text: str) -> list[str]:
    """A stream's data events as they were sent, `[DONE]` included; the first frame must say `retry`."""
    assert text.endswith("\n\n")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(":"))
    frames = text.split("\n\n")[:-1]
    assert [frame.startswith("retry: 1000\n") for frame in frames] == [True] + [False] * (len(frames) - 1)
    return [frame.removeprefix("retry: 1000\n") for frame in frames]


def events_of(text: str) -> list[dict[str, Any]]:
    """Data events as dicts with their event id under `event_id`; the last frame must be `[DONE]`."""
    *frames, done = frames_of(text)
    assert done == "data: [DONE]"
    events = []
    for frame in frames:
        id_line, data_line = frame.split("\n")
        event = json.loads(data_line.removeprefix("data: "))
        events.append(event | {"event_id": id_line.removeprefix("id: ").partition(":")[2]})
    return events


class Visitor:
    """An ASGI client that sends a body, or reads `id`, and leaves when `leave` is called or after so many messages."""

    leave_after = 0
    headers: Sequence[tuple[bytes, bytes]] = ()

    def __init__(self, app: FastAPI, id: str | None = None, query: bytes = b"", **fields: Any) -> None:
        self._app, self._body = app, json.dumps({"prompt": "hi", **fields}).encode()
        self._method, self._query = ("POST" if id is None else "GET"), query
        self._path = "/generate" if id is None else f"/generate/{id}"
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": self._body, "more_body": False})
        self.sent: list[dict[str, Any]] = []

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) == self.leave_after:
            self.leave()

    @property
    def text(self) -> str:
        """What came so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def visit(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self._method,
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": self._query,
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *self.headers],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await self._app(scope, self._inbox.get, self._send)
