"""`make bench-events`: server-sent events a second from an engine without a network, beside what else sends events.

All paths are in one server process, one after the other, in turns: the native route and chat, from a full worker and
broker but an engine that draws nothing; sse-starlette, fed with constant bytes; and a bare loop of ASGI sends. These
two give the event loop a turn after every event: who sends what is being made has to, and without it bytes gather into
few large writes, which measures the socket. Every path waits until all its readers are there, and is measured from
then on, by another process with raw sockets. On a shared machine only the ratio of a turn means much; processor time
of the server tells the same with less noise. Fails if a stream lacks an event.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs

import psutil
import uvloop
from fastapi import FastAPI
from sse_starlette import EventSourceResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loadtests.client import wait_until_ready
from model.request import Delta, Finish, FinishReason, Request
from model.tokenizer import Tokenizer
from service.broker.memory import MemoryBroker
from service.door import Door, served
from service.listen import bind
from service.metrics_work import WorkMetrics
from service.settings import BUNDLED, Settings
from service.worker import Worker

EVENT = (
    b'id: gen-0123456789abcdef0123456789abcdef:100\ndata: {"id":"gen-0123456789abcdef0123456789abcdef","model":'
    b'"bundled","created":1700000000,"seed":16,"choices":[{"index":0,"text":" word","token_ids":[1234],"logprobs":null,'
    b'"finish_reason":null,"stop_reason":null}]}\n\n'
)
FRAMEWORK, BARE = "/sse-starlette", "/bare"
TEXT = "The old woman went down the long white road that led to the town, and did not look back once. "
BODIES: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "Once"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Once"}]},
}
BASELINES = (FRAMEWORK, BARE)
HANG_S = 120.0
GATHERED_S = 0.5  # between the last reader's coming and the first event


class InstantEngine:
    """Nothing is computed: each step gives one token of `ids` to every request, once there are as many as each one's
    seed says."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._rows: dict[str, tuple[int, int]] = {}  # index, last index
        self._num_wanted, self._begun = 1, False
        self._stats, self._pause = Stats(), threading.Event()

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None:
        self._rows[request.id] = (len(so_far), request.sampling.max_tokens - 1)
        self._num_wanted = request.sampling.seed
        self._begun = self._begun or len(self._rows) == self._num_wanted

    def cancel(self, id: str) -> None:
        self._rows.pop(id, None)

    def has_work(self) -> bool:
        self._begun = self._begun and bool(self._rows)
        return self._begun

    def room(self) -> int:
        return 10_000

    def stats(self) -> "Stats":
        return self._stats

    def step(self) -> list[Delta]:
        if not self._begun:
            return []
        if not any(index for index, _ in self._rows.values()):
            self._pause.wait(GATHERED_S)
        return [self._advance(id, row) for id, row in list(self._rows.items())]

    def _advance(self, id: str, row: tuple[int, int]) -> Delta:
        index, last = row
        if index == last:
            del self._rows[id]
            return Delta(id, index, (self._ids[index % len(self._ids)],), finish=Finish(FinishReason.LENGTH))
        self._rows[id] = (index + 1, last)
        return Delta(id, index, (self._ids[index % len(self._ids)],))


@dataclass(frozen=True, slots=True)
class Stats:
    """As an engine's, without having to import one."""

    num_blocks: int = 1
    num_free_blocks: int = 1
    num_running: int = 1
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    last_rows: int = 1
    prefix_asked_total: int = 0
    prefix_found_total: int = 0


class Gathering:
    """Where readers wait for each other."""

    def __init__(self) -> None:
        self._num_here, self._all_here = 0, asyncio.Event()

    async def join(self, num_wanted: int) -> None:
        self._num_here += 1
        all_here = self._all_here
        if self._num_here == num_wanted:
            self._num_here, self._all_here = 0, asyncio.Event()
            await asyncio.sleep(GATHERED_S)
            all_here.set()
        await all_here.wait()


class Baselines:
    """Before the application, two paths that send the same bytes `tokens` times, to `streams` readers each: a route of
    a framework's as any other, and none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._gathering = app, Gathering()
        self._framework = FastAPI()
        self._framework.add_api_route(FRAMEWORK, self._constant)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in BASELINES:
            await self._app(scope, receive, send)
        elif scope["path"] == FRAMEWORK:
            await self._framework(scope, receive, send)
        else:
            query = parse_qs(scope["query_string"].decode())
            await self._bare(send, int(query["streams"][0]), int(query["tokens"][0]))

    async def _constant(self, streams: int, tokens: int) -> EventSourceResponse:
        async def events() -> AsyncIterator[bytes]:
            await self._gathering.join(streams)
            for _ in range(tokens):
                yield EVENT
                await asyncio.sleep(0)

        return EventSourceResponse(events())

    async def _bare(self, send: Send, num_streams: int, num_tokens: int) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._gathering.join(num_streams)
        for _ in range(num_tokens):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def serve(port: int) -> None:
    """What is measured; the parts of `millrace serve`, with another engine."""
    settings = Settings.model_validate({"port": port, "max_waiting": 10_000})
    tokenizer = Tokenizer.load(BUNDLED)
    door = Door(settings, bind("127.0.0.1", port), lambda: None)
    door._server.config.app = Baselines(cast(ASGIApp, door._server.config.app))
    broker = MemoryBroker(settings.max_waiting, 10**9)
    work: WorkMetrics[Stats] = WorkMetrics(door.metrics.registry)
    worker = Worker(broker, InstantEngine(tokenizer.encode(TEXT, special=False)), work.on_step, left=work.on_leave)
    async with door.open() as serving:
        working = asyncio.create_task(worker.run())
        door.heed_signals()
        door.backend.loaded(served(settings, tokenizer, 100_000), broker)
        await door.until_told(working, serving)


# --- the reader ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: events a second, by the clock and by the processor time that the server took."""

    per_s: float
    per_cpu_s: float


class Reader(asyncio.Protocol):
    """One stream: asks on connecting, counts events, ends with the connection."""

    def __init__(self, head: bytes, done: "asyncio.Future[None]") -> None:
        self._head, self._done, self._last = head, done, b""
        self.num_events, self.first_s, self.status = 0, 0.0, b""
        self.begun = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._head)

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self.status = data[:12]
            self.begun.set()
        found = (self._last + data).count(b"\n\n")  # an event's end; at most one byte of it is in two reads
        if found and not self.num_events:
            self.first_s = time.monotonic()
        self.num_events += found
        self._last = b"\n" if data.endswith(b"\n") and not data.endswith(b"\n\n") else b""

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


async def measure(port: int, path: str, num_streams: int, num_tokens: int, server: psutil.Process) -> Figures | None:
    """None if there is no such route."""
    loop, readers, ends = asyncio.get_running_loop(), [], []
    for _ in range(num_streams):
        done = loop.create_future()
        reader = Reader(_head(path, num_streams, num_tokens), done)
        await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", port)  # type: ignore[misc]
        readers.append(reader)
        ends.append(done)
    async with asyncio.timeout(HANG_S):
        for reader in readers:
            await reader.begun.wait()
    if b" 404" in readers[0].status:
        return None
    before = server.cpu_times()
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*ends)
    ended_s, after = time.monotonic(), server.cpu_times()
    for reader in readers:
        if b" 200" not in reader.status or reader.num_events < num_tokens:
            raise RuntimeError(f"{path}: {reader.status!r} and {reader.num_events} events, not {num_tokens}")
    num_events = sum(reader.num_events for reader in readers)
    cpu_s = after.user + after.system - before.user - before.system
    return Figures(num_events / (ended_s - min(reader.first_s for reader in readers)), num_events / cpu_s)


def _head(path: str, num_streams: int, num_tokens: int) -> bytes:
    if path in BASELINES:
        query = f"streams={num_streams}&tokens={num_tokens}"
        return f"GET {path}?{query} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()
    fields = {"max_tokens": num_tokens, "ignore_eos": True, "seed": num_streams, "stream": True}
    payload = json.dumps(BODIES[path] | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(payload), payload)


def report(num_streams: int, runs: dict[str, list[Figures]]) -> list[dict[str, object]]:
    """Print and return the medians, and what share of each baseline a path reaches (median of turns)."""
    rows: list[dict[str, object]] = []
    for path, results in runs.items():
        row: dict[str, object] = {"streams": num_streams, "path": path}
        row |= {name: statistics.median(getattr(each, name) for each in results) for name in Figures.__slots__}
        told = (
            f"{num_streams:4d} streams  {path:21s} {row['per_s']:8,.0f} events/s {row['per_cpu_s']:8,.0f} a CPU second"
        )
        for base in BASELINES if path not in BASELINES else ():
            for name in Figures.__slots__:
                shares = [getattr(a, name) / getattr(b, name) for a, b in zip(results, runs[base], strict=True)]
                row[f"{name} of {base[1:]}"] = statistics.median(shares)
            told += f"   {row[f'per_s of {base[1:]}']:.2f} ({row[f'per_cpu_s of {base[1:]}']:.2f} by CPU) of {base[1:]}"
        print(told, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--events", type=int, default=100_000, help="of each measurement, over all streams")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--paths", nargs="+", default=list(BODIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.serve))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "loadtests.bench_events", "--serve", str(port)])
    try:
        wait_until_ready(port)
        rows = [row for num in args.streams for row in turns(args, num, port, psutil.Process(process.pid))]
    finally:
        process.terminate()
        process.wait()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def turns(args: argparse.Namespace, num_streams: int, port: int, server: psutil.Process) -> list[dict[str, object]]:
    """All paths in turn, so many times; the first turn warms them up."""
    runs: dict[str, list[Figures]] = {path: [] for path in (*args.paths, *BASELINES)}
    for turn in range(args.rounds + 1):
        for path in list(runs):
            result = uvloop.run(measure(port, path, num_streams, args.events // num_streams, server))
            if result is None:
                print(f"there is no {path} here", flush=True)
                del runs[path]
            elif turn:
                runs[path].append(result)
    return report(num_streams, runs)


if __name__ == "__main__":
    main()
