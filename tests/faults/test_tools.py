"""The tools of the fault tests are tested first: a checker that sees nothing and a fault that does not happen would
make every other test green."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.client import Reading, read_part, resilient
from tests.faults.conftest import MakeRedis
from tests.faults.history import Expected, Unfailed, asked, complaints
from tests.faults.procs import wait
from tests.faults.proxy import Proxy
from tests.faults.redis_server import FAKETIME, RedisServer
from tests.faults.sse import Chunked, Event, EventParser, Malformed

# --- redis-server ----------------------------------------------------------------------------------------------------


def test_a_server_starts_fast_and_a_kill_loses_what_it_did_not_keep(make_redis: MakeRedis) -> None:
    server = make_redis()
    server.cli().set("a", 1)
    began_s = time.monotonic()
    server.restart()
    assert time.monotonic() - began_s < 2.0
    assert server.cli().get("a") is None


def test_an_appendonly_server_keeps_its_data_unless_told_otherwise(make_redis: MakeRedis) -> None:
    server = make_redis(appendonly=True)
    server.cli().set("a", 1)
    server.kill9()
    server.restart()
    assert server.cli().get("a") == b"1"
    server.restart(keep_data=False)
    assert server.cli().get("a") is None


def test_a_full_server_refuses_until_it_is_emptied(make_redis: MakeRedis) -> None:
    server = make_redis(password="secret")
    server.fill()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        server.cli().set("a", 1)
    server.empty()
    server.cli().set("a", 1)
    assert ":secret@" in server.url


def test_a_frozen_server_answers_later(redis_server: RedisServer) -> None:
    redis_server.stop()
    with socket.create_connection(("127.0.0.1", redis_server.port)) as plain:
        plain.sendall(b"PING\r\n")
        plain.settimeout(0.2)
        with pytest.raises(TimeoutError):
            plain.recv(10)
        redis_server.cont()
        plain.settimeout(5)
        assert plain.recv(10) == b"+PONG\r\n"


@pytest.mark.skipif(FAKETIME is None and os.environ.get("REQUIRE_REDIS") != "1", reason="libfaketime is not installed")
def test_a_clock_can_be_moved(make_redis: MakeRedis) -> None:
    server = make_redis(clock=True)
    server.set_clock(3600)
    assert 3590 < server.cli().time()[0] - time.time() < 3610
    server.set_clock(-3600)
    assert -3610 < server.cli().time()[0] - time.time() < -3590


# --- the proxy -------------------------------------------------------------------------------------------------------


def through(proxy: Proxy) -> "redis.Redis":
    """A client that tries once and gives up early."""
    once = Retry(NoBackoff(), 0)
    return redis.Redis(port=proxy.port, socket_timeout=1.0, retry=once, protocol=2)


def test_a_dropped_reply_was_executed(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy, through(proxy) as client:
        client.ping()
        proxy.drop_replies(1, after=b"INCR")
        client.ping()
        with pytest.raises(redis.ConnectionError):
            client.incr("a")
        assert (client.get("a"), proxy.num_dropped) == (b"1", 1)


def test_delay_split_reset_and_refusal(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy, through(proxy) as client:
        client.ping()
        proxy.delay_s, proxy.split = 0.05, True
        began_s = time.monotonic()
        assert client.echo("x" * 300) == b"x" * 300
        assert time.monotonic() - began_s >= 0.1
        proxy.delay_s, proxy.split = 0.0, False
        proxy.reset()
        wait(lambda: proxy.num_open == 0, "reset")
        proxy.refuse(True)
        with pytest.raises(redis.ConnectionError):
            client.ping()
        proxy.refuse(False)
        assert client.ping()


def test_a_black_hole_lets_nothing_through_and_then_all_of_it(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy, through(proxy) as client:
        client.ping()
        proxy.black_hole(1.5)
        with pytest.raises(redis.TimeoutError):
            client.incr("a")
        proxy.black_hole(0.0)
        assert client.incr("b") == 1


# --- the reader ------------------------------------------------------------------------------------------------------

STREAM = (
    b"\xef\xbb\xbf: hello\r\nretry: 200\nid: a:1\rdata: x\ndata:y\n\nid:a\0b\ndata\n\nevent: e\ndata: {}\n\ndata: cut"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_as_the_standard_says_however_the_bytes_come(size: int) -> None:
    parser, events = EventParser(), []
    for i in range(0, len(STREAM), size):
        events += parser.feed(STREAM[i : i + size], 0.0)
    assert events == [Event("a:1", "message", b"x\ny", 0.0), Event("a:1", "e", b"{}", 0.0)]
    assert (parser.comments, parser.retry_ms) == ([b"hello"], 200)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_chunked_body_ends_with_its_last_chunk_only(size: int) -> None:
    raw, chunked = b"5\r\nhello\r\nB\r\n, it is me.\r\n0\r\n\r\n", Chunked()
    got = b"".join(chunked.feed(raw[:-1][i : i + size]) for i in range(0, len(raw) - 1, size))
    assert (got, chunked.ended) == (b"hello, it is me.", False)
    assert (chunked.feed(raw[-1:]), chunked.ended) == (b"", True)


@pytest.mark.parametrize("raw", [b"hello\r\n", b"1\r\nab\r\n", b"0\r\n\r\nmore", b"-1\r\n\r\n"])
def test_a_malformed_body_is_told(raw: bytes) -> None:
    with pytest.raises(Malformed):
        Chunked().feed(raw)


def event(count: int, *ids: int, text: str = "t", **more: object) -> bytes:
    """A frame of request `r` as the product writes them."""
    choice = {"index": 0, "text": text, "token_ids": list(ids), "finish_reason": more.pop("reason", None)}
    data = json.dumps({"id": "r", "choices": [choice], **more})
    return f"id: r:{count}\ndata: {data}\n\n".encode()


def end(count: int) -> bytes:
    return event(count, text="", reason="length", usage={"completion_tokens": count}) + b"data: [DONE]\n\n"


Script = list[tuple[bytes, bool]]  # for each connection in turn: the stream's bytes, and whether it ends in order


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers each connection with the next stream; yields its port and the heads that it got."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        stream, in_order = script[len(heads) - 1]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(stream), stream) if stream else b"")
        writer.write(b"0\r\n\r\n" if in_order else b"")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], heads


async def read_script(script: Script) -> tuple[Reading, list[bytes]]:
    async with scripted(script) as (port, heads):
        return await resilient(lambda: [port], {"prompt": "p"}, key="k", give_up_s=1.0), heads


async def test_parts_are_joined_into_one_reading() -> None:
    reading, heads = await read_script(
        [(b": nothing yet\n\n", False), (event(1, 7) + event(2, 8), False), (b"", True), (event(3, 9) + end(3), True)]
    )
    assert (reading.violations, reading.token_ids, reading.text) == ([], [[7, 8, 9]], ["ttt"])
    assert reading.done and [part.broken is None for part in reading.parts] == [False, False, True, True]
    assert all(b"idempotency-key: k" in head and head.startswith(b"POST /generate ") for head in heads[:2])
    assert all(b"last-event-id: r:2" in head and head.startswith(b"GET /generate/r ") for head in heads[2:])


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ([(event(1, 7), False), (event(1, 7) + end(1), True)], "lost, repeated or reordered"),
        ([(event(1, 7), False), (event(3, 9) + end(3), True)], "lost, repeated or reordered"),
        ([(event(1, 7) + event(1, text="x") + event(1, text="x") + end(1), True)], "repeated"),
        ([(event(1, 7) + end(2), True)], "the terminal event has id"),
        ([(event(1, 7) + end(1).replace(b"data: [DONE]\n\n", b""), True)], "no [DONE]"),
        ([(event(1, 7) + end(1) + event(2, 8), True)], "after the terminal"),
        ([(event(1, 7) + end(1) + b"data: [DONE]\n\n", True)], "[DONE] where it does not belong"),
    ],
)
async def test_what_may_not_come_is_a_violation(script: Script, told: str) -> None:
    reading, _ = await read_script(script)
    assert told in str(reading.violations)


async def test_a_body_that_is_cut_off_is_told_from_one_that_ends() -> None:
    async with scripted([(event(1, 7), False), (event(1, 7), True)]) as (port, _):
        parts = [await read_part(port, "GET", "/generate/r") for _ in range(2)]
    assert [part.broken for part in parts] == ["cut off inside the chunked body", None]


# --- the history -----------------------------------------------------------------------------------------------------


class Answer:
    """An oracle that knows one answer."""

    def expect(self, body: object) -> Expected:
        return Expected([7, 8], "tt")

    def prepare(self, bodies: object) -> None: ...


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (event(1, 7) + event(2, 8) + end(2), ""),
        (event(1, 7) + event(2, 9) + end(2), "differs at token 1"),
        (event(1, 7) + end(1), "differs at token 1"),
        (event(1, 7) + event(2, 8, text="u") + end(2), "differs at token 2"),
        (event(1, 7) + event(2, 8) + end(2).replace(b"length", b"error"), "finish_reason error"),
        (event(1, 7) + event(2, 8) + end(2).replace(b'tokens": 2', b'tokens": 3'), "usage"),
        (event(1, 7), "no terminal event"),
    ],
)
async def test_every_difference_from_the_unfailed_run_is_told(stream: bytes, told: str) -> None:
    reading, _ = await read_script([(stream, True), *[(b"", True)] * 50])
    reading.body = asked("p", seed=1, max_tokens=2)
    found = complaints(reading, Answer())
    assert told in str(found) if told else not found


def test_the_oracle_gives_the_same_answer_twice(model_folder: Path) -> None:
    body, oracle = asked("Once", seed=1, max_tokens=5), Unfailed(model_folder)
    assert len(oracle.expect(body).token_ids) == 5
    assert oracle.expect(body) == Unfailed(model_folder, 20).expect(body)
