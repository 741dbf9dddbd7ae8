"""One connection: what is refused before it is a request, how slowly it may come, how many there may be, and how each
ends."""

import asyncio
import gc
import json
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from service.http import protocol
from service.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from service.listen import Server, bind
from tests.service.helpers_http import Door, hang, say

HANG_S = 20.0
GET = b"GET /health HTTP/1.1\r\nHost: test\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "hi"}'


class House:
    """A door behind a real port."""

    def __init__(self, door: Door, server: Server, port: int) -> None:
        self.door, self.server, self.port = door, server, port

    async def say(self, *parts: bytes) -> bytes:
        """What comes back until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(HANG_S):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0)
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def connections(self) -> int:
        return len(self.server.server_state.connections)


@asynccontextmanager
async def house(door: Door | None = None, max_connections: int = 50) -> AsyncIterator[House]:
    door = door or Door()
    listener = bind("127.0.0.1", 0)
    server = Server(door.app, max_connections, 1)
    serving = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        yield House(door, server, listener.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        await serving


async def until(met: Callable[[], object]) -> None:
    async with asyncio.timeout(HANG_S):
        while not met():  # noqa: ASYNC110  # sockets set no event
            await asyncio.sleep(0.01)


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"HEAD_S": 0.3, "BODY_S": 0.3, "LINGER_S": 0.2, "LAST_BYTES_S": 0.3}.items():
        monkeypatch.setattr(protocol, name, value)
    yield


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def body_of(answer: bytes) -> dict[str, object]:
    told: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return told


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        GET + b"".join(b"a%d: x\r\n" % i for i in range(MAX_HEADERS)) + b"\r\n",
        GET + b"a:\r\n" * 5000,
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        GET + b"x" * 10 * MAX_HEAD_BYTES,
    ],
)
@pytest.mark.parametrize("size", [2**20, 1000])
async def test_headers_are_bounded_however_they_come(head: bytes, size: int) -> None:
    async with house() as door:
        answer = await door.say(*(head[i : i + size] for i in range(0, len(head), size)))
        assert status(answer) == 431
        assert b"connection: close" in answer
        assert body_of(answer)["code"] == "headers_too_large"


async def test_headers_up_to_the_limits_are_taken() -> None:
    async with house() as door:
        many = b"".join(b"a%d: x\r\n" % i for i in range(MAX_HEADERS - 2))
        assert status(await door.say(GET + many + b"Connection: close\r\n\r\n")) == 200
        long = b"a: " + b"x" * (MAX_HEAD_BYTES - len(GET) - 28) + b"\r\n"
        assert status(await door.say(GET + long + b"Connection: close\r\n\r\n")) == 200


async def test_openai_routes_are_refused_in_openais_words() -> None:
    async with house() as door:
        answer = await door.say(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n" + b"a: x\r\n" * 100)
        assert status(answer) == 431
        assert body_of(answer)["error"]


@pytest.mark.parametrize(
    "head", [b"", b"GET", GET, GET + b"a: b", b"\r\n", b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" + GET]
)
async def test_headers_that_do_not_come_are_not_waited_for(in_a_hurry: None, head: bytes) -> None:
    async with house() as door:
        answer = await door.say(head)
        last = answer[answer.rfind(b"HTTP/1.1") :]
        assert status(last) == (408 if head else 0)


async def test_headers_that_drip_are_not_waited_for(in_a_hurry: None) -> None:
    async with house() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        dripping = asyncio.create_task(_drip(writer))
        async with asyncio.timeout(HANG_S):
            answer = await reader.read()
        dripping.cancel()
        writer.close()
        assert status(answer) in (0, 408)


async def _drip(writer: asyncio.StreamWriter) -> None:
    for byte in GET + b"a: " + b"x" * 1000:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,  # TLS
        b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"__class__ / HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: test\r\n\r\n",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost : test\r\n\r\n",
        b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: test\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_at_once(junk: bytes) -> None:
    async with house() as door:
        answer = await door.say(junk)
        assert status(answer) == 400, answer
        assert body_of(answer)["code"] == "bad_request"


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
async def test_a_body_that_does_not_come_is_not_waited_for(in_a_hurry: None, head: bytes) -> None:
    async with house() as door:
        answer = await door.say(POST + head)
        assert status(answer) == 408
        assert body_of(answer)["code"] == "too_slow"
        assert not door.door.broker.requests


async def test_a_body_that_comes_may_take_longer(in_a_hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_BYTES_PER_S", 10)
    async with house() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (len(BODY) + 20))
        for part in (b" " * 20, BODY[:8], BODY[8:]):
            writer.write(part)
            await asyncio.sleep(0.25)
        async with asyncio.timeout(HANG_S):
            assert status(await reader.read()) == 200
        writer.close()


async def test_an_endless_body_is_refused_and_the_refusal_arrives() -> None:
    async with house() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")

        async def flood() -> None:
            while True:
                writer.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")
                await writer.drain()

        flooding = asyncio.create_task(flood())
        async with asyncio.timeout(HANG_S):
            answer = await reader.readuntil(b"}")
            assert status(answer) == 413
            assert b"connection: close" in answer.lower()
            with pytest.raises(ConnectionError):
                await flooding
        writer.close()


async def test_a_body_that_nobody_wants_ends_the_connection_after_a_while() -> None:
    async with house() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: test\r\nContent-Length: 999999999\r\n\r\n")
        async with asyncio.timeout(HANG_S):
            assert status(await reader.readuntil(b"}")) == 404
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b" " * 2**16)
                    await writer.drain()
        writer.close()


async def test_after_an_early_answer_a_small_body_does_not_cost_the_connection() -> None:
    async with house() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n")
        async with asyncio.timeout(HANG_S):
            assert status(await reader.readuntil(b"}")) == 404
            writer.write(b"hello" + GET + b"\r\n")
            assert status(await reader.readuntil(b"}")) == 200
        writer.close()


# --- how many --------------------------------------------------------------------------------------------------------


async def _silent(port: int, num: int, said: bytes = b"") -> list[socket.socket]:
    found = []
    for _ in range(num):
        found.append(socket.create_connection(("127.0.0.1", port)))
        found[-1].sendall(said)
    await asyncio.sleep(0)
    return found


@pytest.mark.parametrize("said", [b"", GET, POST + b"Content-Length: 99\r\n\r\n"])
async def test_whoever_only_holds_sockets_open_makes_room_for_who_asks(said: bytes) -> None:
    async with house(max_connections=10) as door:
        held = await _silent(door.port, 30, said)
        for _ in range(5):
            assert status(await door.say(GET + b"Connection: close\r\n\r\n")) == 200
        assert door.connections() <= 11
        for each in held:
            each.close()


async def test_where_everybody_is_being_answered_one_more_is_told_to_come_again() -> None:
    async with house(Door(hang()), max_connections=3) as door:
        asked = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        held = await _silent(door.port, 3, asked)
        await until(lambda: len(door.door.broker.requests) == 3)
        answer = await door.say(GET + b"\r\n")
        assert status(answer) == 503
        assert b"retry-after: " in answer.lower()
        for each in held:
            each.close()


async def test_accepted_sockets_have_the_listeners_options() -> None:
    listener = bind("127.0.0.1", 0)
    listener.listen()
    with listener, socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2**18  # the kernel counts double
        assert client


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_requests_in_a_row_and_at_once_are_answered_in_order() -> None:
    async with house() as door:
        asked = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        answer = await door.say(asked + GET + b"\r\n" + asked + GET + b"Connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200") == 4
        assert answer.index(b"hello") < answer.index(b"alive") < answer.rindex(b"hello") < answer.rindex(b"alive")


async def test_a_thousand_requests_at_once_are_too_many() -> None:
    async with house(Door(hang())) as door:
        asked = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        assert await door.say(asked + (GET + b"\r\n") * 1000) == b""


async def test_what_is_sent_behind_a_stream_does_not_break_it(in_a_hurry: None) -> None:
    async with house(Door(hang(*say("hel")(None)[:2]))) as door:  # type: ignore[arg-type, index]
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        asked = b'{"prompt": "hi", "stream": true}'
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(asked) + asked + GET)
        async with asyncio.timeout(HANG_S):
            await reader.readuntil(b'"text":"e"')
            await asyncio.sleep(1.0)  # longer than headers may take
        assert not reader.at_eof()
        writer.close()


async def test_a_protocol_that_is_not_spoken_is_passed_over() -> None:
    h2c = GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    asked = POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    async with house() as door:
        for said in (h2c + b"\r\n", asked):
            reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
            writer.write(said)
            async with asyncio.timeout(HANG_S):
                first = await reader.readuntil(b"}")
                writer.write(GET + b"Connection: close\r\n\r\n")
                rest = await reader.read()
            writer.close()
            assert (first + rest).count(b"HTTP/1.1 200") == 2


async def test_a_reader_that_takes_nothing_is_cut_and_its_socket_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.sse.PING_S", 0.1)
    monkeypatch.setattr("service.http.sse.STUCK_S", 0.3)
    async with house(Door(say("x" * 100_000))) as door:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", door.port))
            body = b'{"prompt": "hi", "stream": true, "resumable": true}'
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await until(door.connections)
            await until(lambda: not door.connections())
        assert not door.door.broker.cancelled


async def test_an_answer_that_nobody_takes_does_not_keep_its_socket(in_a_hurry: None) -> None:
    async with house(Door(say("x" * 80_000))) as door:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", door.port))
            client.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
            await until(lambda: door.door.broker.requests)
            await until(lambda: not door.connections())


async def test_a_client_that_resets_leaves_nothing_behind() -> None:
    async with house(Door(hang())) as door:
        asked = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        for said in (b"", GET, asked, asked[:-3]):
            with socket.create_connection(("127.0.0.1", door.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(said)
        await until(lambda: not door.connections() and not door.server.server_state.tasks)


def _is_empty(refs: "weakref.WeakSet[object]") -> bool:
    return not len(refs)


async def test_what_has_ended_is_freed_without_the_collector() -> None:
    async with house() as door:
        gc.disable()
        try:
            for said in (b"", GET, GET + b"\r\n", POST + b"Content-Length: 9\r\n\r\n{"):
                [client] = await _silent(door.port, 1, said)
                await until(door.connections)
                refs: weakref.WeakSet[object] = weakref.WeakSet(door.server.server_state.connections)
                client.close()
                await until(partial(_is_empty, refs))
        finally:
            gc.enable()
