"""A client that reads a stream to its end whatever breaks, and keeps every byte it was told.

It drives hundreds of streams in one process: raw sockets, no HTTP library. It trusts nothing: a lost, repeated or
reordered event is a violation at the moment it comes, and so is anything after the end. It compares with nothing but
the stream itself; what the tokens should be is `history.py`'s question.
"""

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.faults.sse import Chunked, Event, EventParser, Head, Malformed, parse_head

RETRY_S = 0.1  # between two attempts, where the server did not say
CONNECT_S = 5.0
DONE = b"[DONE]"
Ports = Callable[[], Sequence[int]]  # those to try now, in order


@dataclass(slots=True)
class Part:
    """One connection: what came over it. `broken` is how it ended too early, None after an orderly end."""

    port: int
    sent_s: float
    head: Head | None = None
    events: list[Event] = field(default_factory=list)
    comments: list[bytes] = field(default_factory=list)
    retry_ms: int | None = None
    body: bytes = b""  # of an answer that is no stream
    broken: str | None = None
    done: bool = False  # [DONE] came
    ended_s: float = 0.0

    @property
    def status(self) -> int:
        """0: no answer at all."""
        return self.head.status if self.head else 0


@dataclass(slots=True, eq=False)
class Reading:
    """One request as its client saw it, over all connections. Empty `violations` is what every test wants."""

    body: Mapping[str, Any]
    id: str = ""
    events: list[Event] = field(default_factory=list)  # joined; without [DONE]
    counts: tuple[int, ...] = ()  # tokens so far of each choice, as the event id tells them
    token_ids: list[list[int]] = field(default_factory=list)  # of each choice
    text: list[str] = field(default_factory=list)
    terminal: dict[str, Any] | None = None
    done: bool = False
    parts: list[Part] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)  # pulsed at every event

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def last_id(self) -> str:
        return self.events[-1].id if self.events else ""

    @property
    def statuses(self) -> list[int]:
        """Of every answer in turn, attempts that got none left out."""
        return [part.status for part in self.parts if part.status]

    def data(self) -> list[tuple[str, bytes]]:
        """What must be the same for every reader, to the byte."""
        return [(event.id, event.data) for event in self.events]

    def longest_gap_s(self) -> float:
        """The longest time between two events."""
        times = [event.at_s for event in self.events]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    def take(self, event: Event) -> None:
        """Join one event to what was read before it."""
        if event.data == DONE:
            self.check(self.terminal is not None and not self.done, "[DONE] where it does not belong")
            self.done = True
            return
        self.check(self.terminal is None, f"an event after the terminal one: {event.data[:80]!r}")
        told: dict[str, Any] = json.loads(event.data)
        id, _, tail = event.id.rpartition(":")
        self.check(id == told["id"] and self.id in ("", id), f"event id {event.id!r} of {told['id']} for {self.id!r}")
        counts = tuple(int(count) for count in tail.split(","))
        if not self.counts:
            self.id, self.counts = id, (0,) * len(counts)
            self.token_ids, self.text = [[] for _ in counts], [""] * len(counts)
        if "usage" in told:
            self.check(counts == self.counts, f"the terminal event has id {event.id!r} after {self.counts}")
            self.terminal = told
        else:
            self._step(event, counts, told["choices"])
        self.events.append(event)
        self.arrived.set()
        self.arrived.clear()

    def _step(self, event: Event, counts: tuple[int, ...], choices: list[dict[str, Any]]) -> None:
        after = list(self.counts)
        for choice in choices:
            after[choice["index"]] += len(choice["token_ids"])
            self.token_ids[choice["index"]] += choice["token_ids"]
            self.text[choice["index"]] += choice["text"]
        self.check(tuple(after) == counts, f"event {event.id!r} after {self.counts}: lost, repeated or reordered")
        self.check(not self.events or event.data != self.events[-1].data or counts != self.counts, "repeated")
        self.counts = counts

    def check(self, holds: bool, complaint: str) -> None:
        """Note a violation unless it holds."""
        if not holds:
            self.violations.append(complaint)


async def connect(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    buffer_bytes: int = 0,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open connection with the request written to it. With `buffer_bytes` it takes hardly more than that before
    somebody reads. Raises `OSError`."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    raw = socket.socket()
    raw.setblocking(False)
    if buffer_bytes:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    try:
        async with asyncio.timeout(CONNECT_S):
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    except BaseException:
        raw.close()
        raise
    reader, writer = await asyncio.open_connection(sock=raw, limit=buffer_bytes or 1 << 16)
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    return reader, writer


async def read_part(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    take: Callable[[Event], None] = lambda event: None,
    wait_for: asyncio.Event | None = None,
) -> Part:
    """One connection from request to end; `take` gets each event as it comes. Nothing is read before `wait_for` is set.
    Never raises for what breaks."""
    part = Part(port, time.monotonic())
    writer = None
    try:
        reader, writer = await connect(port, method, path, body, headers, 0 if wait_for is None else 4096)
        if wait_for is not None:
            await wait_for.wait()
        part.head = parse_head((await reader.readuntil(b"\r\n\r\n"))[:-4])
        if "text/event-stream" in part.head.headers.get("content-type", ""):
            await _read_events(reader, part, take)
        else:
            part.body = await reader.read()
    except asyncio.IncompleteReadError as error:
        part.broken = f"closed after {len(error.partial)} bytes of the head"
    except (OSError, TimeoutError, Malformed) as error:
        part.broken = f"{type(error).__name__}: {error}"
    finally:
        part.ended_s = time.monotonic()
        if writer is not None:
            writer.close()
    return part


async def _read_events(reader: asyncio.StreamReader, part: Part, take: Callable[[Event], None]) -> None:
    chunked, parser = Chunked(), EventParser()
    part.comments = parser.comments
    while data := await reader.read(1 << 16):
        for event in parser.feed(chunked.feed(data), time.monotonic()):
            part.events.append(event)
            part.done = part.done or event.data == DONE
            take(event)
        part.retry_ms = parser.retry_ms
    if not chunked.ended:
        part.broken = "cut off inside the chunked body"


async def ask(port: int, method: str, path: str, fields: object = None, **headers: str) -> Part:
    """One request, one answer. Underscores in header names are hyphens."""
    body = b"" if fields is None else json.dumps(fields).encode()
    return await read_part(port, method, path, body, {name.replace("_", "-"): v for name, v in headers.items()})


async def resilient(
    ports: Ports, fields: Mapping[str, Any], *, key: str = "", give_up_s: float = 90.0, reading: Reading | None = None
) -> Reading:
    """POST a stream and read it to its end: after a broken or handed-over connection go on where it stopped, by
    `Last-Event-ID` on the next port, or where nothing was told yet by the same POST with its `Idempotency-Key`.

    503s and connections refused are tried again until `give_up_s`; then, and at a status that says no, it returns what
    there is. Pass `reading` to look at it while it grows.
    """
    reading = Reading(dict(fields)) if reading is None else reading
    body = json.dumps({**fields, "stream": True}).encode()
    until_s = time.monotonic() + give_up_s
    for attempt in itertools.count():
        if tried := ports():
            reading.parts.append(part := await _attempt(tried[attempt % len(tried)], reading, body, key))
            if reading.terminal is not None:
                reading.check(reading.done or part.broken is not None, "no [DONE] after the terminal event")
                break
            if part.status not in (0, 200, 503):
                break
            if part.events:
                continue  # broken or handed over in the middle: on at once
        if time.monotonic() > until_s:
            break
        await asyncio.sleep(RETRY_S)
    return reading


async def _attempt(port: int, reading: Reading, body: bytes, key: str) -> Part:
    if not reading.events:
        headers = {"idempotency-key": key} if key else {}
        return await read_part(port, "POST", "/generate", body, headers, reading.take)
    return await read_part(
        port, "GET", f"/generate/{reading.id}", headers={"last-event-id": reading.last_id}, take=reading.take
    )


async def replay(port: int, id: str, after: str = "") -> Reading:
    """Read a known request on one port, from the start or behind an event id."""
    reading = Reading({})
    if after:
        base, _, counts = after.rpartition(":")
        reading.id, reading.counts = base, tuple(int(count) for count in counts.split(","))
        reading.token_ids, reading.text = [[] for _ in reading.counts], [""] * len(reading.counts)
    headers = {"last-event-id": after} if after else {}
    part = await read_part(port, "GET", f"/generate/{id}", headers=headers, take=reading.take)
    reading.parts.append(part)
    return reading


async def until(holds: Callable[[], bool], what: str, guard_s: float = 60.0) -> None:
    """Wait for a condition; raises `AssertionError` when it has not come within the hang guard."""
    deadline_s = time.monotonic() + guard_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {guard_s:.0f} s: {what}"
        await asyncio.sleep(0.01)


async def leave(writer: asyncio.StreamWriter) -> None:
    """Go away without a word."""
    with suppress(OSError):
        writer.transport.abort()
        await writer.wait_closed()
