"""`make bench-streams`: a thousand streams at thirty tokens a second each, from a toy engine through Redis and an API.

What is measured is the way of a token, not its making: the engine writes the time of every token into shared memory,
the reader compares. The engine is in eight groups that step in turn, as the batches of several workers would. How late
the reader itself was is measured beside (a timer's lateness) and printed, and taken off each token's delay; the CPU
time of each process is printed too. Fails if a token is missing, repeated, out of order or wrong.
"""

import argparse
import asyncio
import json
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import psutil
import uvloop

from loadtests.client import wait_until_ready
from model.engine.engine import EngineStats
from model.families.registry import read_config
from model.request import Delta, Finish, FinishReason, Request
from service.broker.redis import Link
from service.broker.redis_work import RedisWork
from service.worker import Worker
from tests.faults.redis_server import RedisServer, free_port
from tests.faults.toy import info_of, toy_id

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
GROUPS = 8
TICK_S = 0.002  # of the reader's own watch
TOKEN = re.compile(rb'id: [^:\n]+:(\d+)\ndata: [^\n]*?"token_ids":\[(\d+)\]')


class Stamps:
    """When token `index` of the request with seed `row` was made: monotonic seconds, which all processes share."""

    def __init__(self, path: Path, rows: int, columns: int, create: bool = False) -> None:
        self._columns, size = columns, rows * columns * 8
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def note(self, row: int, index: int, now_s: float) -> None:
        struct.pack_into("d", self._map, (row * self._columns + index) * 8, now_s)

    def at(self, row: int, index: int) -> float:
        value: float = struct.unpack_from("d", self._map, (row * self._columns + index) * 8)[0]
        return value


class SteadyEngine:
    """One token for each request every `period_s`, by the clock; each step serves one of the groups."""

    def __init__(self, vocab_size: int, period_s: float, stamps: Stamps) -> None:
        self._vocab_size, self._stamps = vocab_size, stamps
        self._rows: dict[str, tuple[Request, int, int]] = {}
        self._step_s, self._next_s, self._group, self._added = period_s / GROUPS, time.monotonic(), 0, 0
        self._pause = threading.Event()

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None:
        self._rows[request.id] = (request, len(so_far), self._added % GROUPS)
        self._added += 1

    def cancel(self, id: str) -> None:
        self._rows.pop(id, None)

    def has_work(self) -> bool:
        return bool(self._rows)

    def room(self) -> int:
        return 10_000 - len(self._rows)

    def stats(self) -> EngineStats:
        return EngineStats(0, len(self._rows), 1, 1, 0, 0, 0, 0, len(self._rows))

    def step(self) -> list[Delta]:
        if not self._rows:
            return []
        self._next_s += self._step_s
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._pause.wait(self._next_s - now_s)
        elif now_s > self._next_s + 1:
            self._next_s = now_s
        self._group = (self._group + 1) % GROUPS
        now_s = time.monotonic()
        return [self._advance(id, row, now_s) for id, row in list(self._rows.items()) if row[2] == self._group]

    def _advance(self, id: str, row: tuple[Request, int, int], now_s: float) -> Delta:
        request, index, group = row
        seed = request.sampling.seed
        self._stamps.note(seed, index, now_s)
        finish = None
        if index + 1 >= request.sampling.max_tokens:
            finish = Finish(FinishReason.LENGTH)
            del self._rows[id]
        else:
            self._rows[id] = (request, index + 1, group)
        return Delta(id, index, (toy_id(seed, index, self._vocab_size),), finish=finish)


class Reader(asyncio.Protocol):
    """One stream: asks on connecting, notes the time of every token, ends with the connection."""

    def __init__(self, seed: int, num_tokens: int, lag: "Lag", done: "asyncio.Future[None]") -> None:
        body = {"prompt": "Once", "seed": seed, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        payload = json.dumps(body).encode()
        self._request = b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        self._request += b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(payload), payload)
        self._lag, self._done, self._rest = lag, done, b""
        self.tokens: list[tuple[int, int, float, float]] = []  # index, id, when, how late the reader was
        self.status, self.tail = b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def leave(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if not self.status:
            self.status = data[:12]
        data = self._rest + data
        end = 0
        for match in TOKEN.finditer(data):
            self.tokens.append((int(match[1]) - 1, int(match[2]), now_s, self._lag.late_s))
            end = match.end()
        self._rest = data[end:][-4096:]
        self.tail = data[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


class Lag:
    """How late a timer of this process's loop last fired: a token that came in that turn waited so long here."""

    def __init__(self) -> None:
        self.late_s, self.all_s = 0.0, [0.0]

    async def watch(self) -> None:
        while True:
            due_s = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.late_s = max(0.0, time.monotonic() - due_s)
            self.all_s.append(self.late_s)


async def read_all(port: int, args: argparse.Namespace) -> tuple[list[Reader], Lag]:
    loop, lag = asyncio.get_running_loop(), Lag()
    watching = asyncio.create_task(lag.watch())
    readers, ends = [], []
    for seed in range(args.streams):
        done = loop.create_future()
        reader = Reader(seed, args.tokens, lag, done)
        await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", port)  # type: ignore[misc]
        readers.append(reader)
        ends.append(done)
        await asyncio.sleep(args.ramp_s / args.streams)
    if args.storm:
        await asyncio.sleep(args.tokens / args.rate / 3)
        print(f"all freed {await storm(port, readers):.2f} s after {args.streams} readers left at once")
    async with asyncio.timeout(60 + 3 * args.tokens / args.rate):  # a hang guard
        await asyncio.gather(*ends)
    watching.cancel()
    return readers, lag


async def storm(port: int, readers: list[Reader]) -> float:
    """Every reader leaves; seconds until no sequence is held by the worker or waits."""
    began_s = time.monotonic()
    for reader in readers:
        reader.leave()
    while True:
        if not await running(port):
            return time.monotonic() - began_s
        await asyncio.sleep(0.02)


async def running(port: int) -> float:
    """Sequences that a worker holds or that wait, as the api's metrics say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(map(float, re.findall(r"^millrace_requests_(?:running|waiting) (.*)$", text, re.MULTILINE)))


def check(reader: Reader, seed: int, args: argparse.Namespace, vocab_size: int) -> str | None:
    """What is wrong with a stream."""
    if b" 200" not in reader.status:
        return f"status {reader.status!r}"
    ids = [token_id for _, token_id, _, _ in reader.tokens]
    if [index for index, *_ in reader.tokens] != list(range(args.tokens)):
        return f"{len(ids)} tokens of {args.tokens}, or not in order"
    if ids != [toy_id(seed, index, vocab_size) for index in range(args.tokens)]:
        return "other tokens"
    return None if b"[DONE]" in reader.tail else "no end"


async def work(args: argparse.Namespace) -> None:
    """The toy worker's process."""
    stamps = Stamps(args.stamps, args.streams, args.tokens)
    engine = SteadyEngine(read_config(args.model).vocab_size, 1 / args.rate, stamps)
    link = Link(args.work, may_load=True)
    await link.open()
    broker = RedisWork(link, f"steady-{os.getpid()}", info_of(args.model, read_config(args.model).max_position))
    await broker.open()
    print("working", flush=True)
    await Worker(broker, engine).run()


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens/s of each stream")
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--ramp-s", type=float, default=5.0)
    parser.add_argument("--storm", action="store_true", help="all readers leave at once in the middle: what is freed?")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--stamps", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        uvloop.run(work(args))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.stamps = folder / "stamps"
        stamps = Stamps(args.stamps, args.streams, args.tokens, create=True)
        redis = stack.enter_context(RedisServer(folder))
        measure(args, redis, stamps, stack)


def measure(args: argparse.Namespace, redis: RedisServer, stamps: Stamps, stack: ExitStack) -> None:
    """Start, read, check, print."""
    port, python = free_port(), sys.executable
    own = ["--stamps", str(args.stamps), "--streams", str(args.streams), "--tokens", str(args.tokens)]
    own += ["--rate", str(args.rate), "--model", str(args.model)]
    api = ["--redis-url", redis.url, "--model", str(args.model), "--port", str(port), "--max-waiting", "5000"]
    commands = {
        "worker": [python, "-m", "loadtests.streams", "--work", redis.url, *own],
        "api": [python, "-m", "service.cli", "api", *api],
    }
    processes = {}
    env = os.environ | {"MILLRACE_LOG_LEVEL": "warning"}
    for name, command in commands.items():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        stack.callback(process.wait)
        stack.callback(process.kill)
        processes[name] = psutil.Process(process.pid)
    processes["redis"] = psutil.Process(redis.pid)
    processes["reader"] = psutil.Process()
    wait_until_ready(port)
    before = {name: (p.cpu_times(), p.memory_info().rss) for name, p in processes.items()}
    began_s = time.monotonic()
    readers, lag = uvloop.run(read_all(port, args))
    took_s = time.monotonic() - began_s
    vocab_size = read_config(args.model).vocab_size
    if args.storm:
        return
    wrong = [told for seed, reader in enumerate(readers) if (told := check(reader, seed, args, vocab_size))]
    delays = [
        (when_s - stamps.at(seed, index), late_s)
        for seed, reader in enumerate(readers)
        for index, _, when_s, late_s in reader.tokens
    ]
    print(f"{args.streams} streams of {args.tokens} tokens in {took_s:.1f} s: {len(delays) / took_s:,.0f} tokens/s")
    print(f"errors {len(wrong)} {wrong[:3]}")
    for name, values in (
        ("added delay, ms", [max(0.0, delay - late) * 1e3 for delay, late in delays]),
        ("with the reader's lag", [delay * 1e3 for delay, _ in delays]),
        ("the reader's lag", [late * 1e3 for late in lag.all_s]),
    ):
        told = "  ".join(f"p{q * 100:g} {_quantile(values, q):.1f}" for q in (0.5, 0.95, 0.99, 0.999))
        print(f"{name:22s} {told}  max {max(values, default=0):.1f}")
    for name, process in processes.items():
        times, rss = process.cpu_times(), process.memory_info().rss
        used_s = times.user + times.system - before[name][0].user - before[name][0].system
        grown = (rss - before[name][1]) / args.streams / 1024
        print(f"{name:8s} {used_s / took_s:5.2f} cores   {grown:6.1f} KiB more for each stream")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
