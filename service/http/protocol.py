"""One connection: what it may send before it is a request, for how long, how many there may be, and how it ends.

uvicorn's own protocol, which counts nothing and waits for ever. It knows no route, no key and no body's meaning.

A connection waits for its client while headers or a body are on their way, or while it is idle. When there are as many
connections as there may be, the one that has waited longest goes to make room: whoever sends a request at once gets in,
however many sockets somebody holds open. Where nobody waits, the new one is told 503.

A refusal is of no use if it never arrives: closing a socket that has unread bytes resets it, and the answer is lost. So
a connection that ends in the middle of a body reads on for a moment, and throws away what it reads.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.errors import MillraceError, Unavailable
from service.http.openai_errors import refused
from service.http.problems import HttpRefusal

MAX_HEAD_BYTES, MAX_HEADERS = 16 * 2**10, 64  # request line and headers
HEAD_S = 5.0  # from the first byte of a request to the end of its headers
BODY_S, BODY_BYTES_PER_S = 10.0, 64 * 2**10  # for a body: so long, and so much more for what has come of it
LAST_BYTES_S = 30.0  # for a client to take what was written before the connection was closed
LINGER_S = 1.0  # to read on after an early answer
MAX_UNREAD_BYTES = 2**20  # of a body that is no longer wanted
MAX_PIPELINED = 16  # requests that wait for an answer to the one before them

logger = logging.getLogger(__name__)
quiet = logging.getLogger("uvicorn.error.connection")  # a line for each bad request would be a way to fill a disk
quiet.setLevel(logging.ERROR)

Protocols = dict["LimitedProtocol", None]  # a set in order of time


def limited(max_connections: int) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection. They know of each other."""
    waiting: Protocols = {}
    return cast(type[asyncio.Protocol], partial(LimitedProtocol, waiting=waiting, max_connections=max_connections))


class Ending:
    """A transport as uvicorn uses it; to close it is up to the protocol."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write: Callable[[bytes], None] = transport.write
        self.close: Callable[[], None] = end
        self.get_extra_info = transport.get_extra_info
        self._transport, self.ended = transport, False

    def let_go(self) -> None:
        """Nothing more is written, and nothing refers back to the protocol: many connections may end in a second, and
        the collector comes seldom."""
        self.ended = True
        self.write = self.close = _nothing

    def is_closing(self) -> bool:
        """Whether nothing more is answered on it."""
        return self.ended or self._transport.is_closing()


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        waiting: Protocols,
        max_connections: int,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = quiet
        self._waiting, self._max_connections = waiting, max_connections
        self._in_head, self._num_head_bytes, self._num_body_bytes = True, 0, 0
        self._is_incomplete = False  # a body is on its way
        self._timer: asyncio.TimerHandle | None = None
        self._since_s = 0.0

    # --- the life of a connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Make room, or refuse."""
        super().connection_made(transport)
        self._socket = transport
        self._ending = Ending(transport, self._end)
        self.transport = cast(asyncio.Transport, self._ending)
        if len(self.connections) > self._max_connections and not self._displace():
            self._refuse(Unavailable("too many connections are open"))
            return
        self._wait()
        self._set_timer(HEAD_S, self._end)  # whoever said nothing is told nothing

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever was begun for it ends."""
        self._ending.let_go()
        self._unset_timer()
        self._unset_keepalive_if_required()
        self._waiting.pop(self, None)
        super().connection_lost(exc)

    def _displace(self) -> bool:
        """Close who has waited longest."""
        for other in self._waiting:
            if other is not self:
                other.abort()
                return True
        return False

    def abort(self) -> None:
        """Gone at once."""
        self._waiting.pop(self, None)
        self.connections.discard(self)
        self._ending.let_go()
        self._socket.abort()

    def _wait(self) -> None:
        """From now on it is the client's turn."""
        self._waiting.pop(self, None)
        self._waiting[self] = None

    # --- what comes in -----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Pass on what is within the limits. Headers are counted as they come, wherever they are cut."""
        if self._ending.ended:
            return
        rest = b""
        if self._in_head:
            if self._num_head_bytes == 0 and data:
                self._set_timer(HEAD_S, self._too_slow)
            room = MAX_HEAD_BYTES - self._num_head_bytes
            data, rest = data[:room], data[room:]
            self._num_head_bytes += len(data)
        elif self._is_incomplete:
            self._num_body_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._ending.ended:
            return
        if self._in_head and self._num_head_bytes >= MAX_HEAD_BYTES:
            self._too_large()
        elif self._is_incomplete and self._num_body_bytes > MAX_UNREAD_BYTES and self.cycle.response_complete:
            self._end()
        elif rest:
            self.data_received(rest)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(HttpRefusal("bad_request", "this is not HTTP/1.1"))

    def _pass_over(self, rest: bytes) -> None:
        """Another protocol is offered, as Java's client does with every first request. The parser now takes a body for
        that protocol; so read the request again, without the offer."""
        if self._ending.ended:
            return
        if self.parser.get_method() == b"CONNECT":
            self._refuse(HttpRefusal("bad_request", "this is no proxy"))
            return
        head = b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                head += b"%b: %b\r\n" % (name, value)
        self.parser = httptools.HttpRequestParser(self)
        self._in_head = True
        self._parse(head + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        """The first byte of a request, which may come with the end of another."""
        super().on_message_begin()
        self._set_timer(HEAD_S, self._too_slow)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One more."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_large()

    def on_headers_complete(self) -> None:
        """Now it is a request, and its body's time begins."""
        if self._ending.ended or self.parser.should_upgrade():
            return
        self._in_head, self._num_body_bytes, self._is_incomplete = False, 0, True
        self._since_s = self.loop.time()
        self._set_timer(BODY_S, self._look_at_body)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.abort()

    def on_body(self, body: bytes) -> None:
        """What is not read any more is not kept."""
        if not self._ending.ended:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """It is our turn, unless it was answered already."""
        if self.parser.should_upgrade():
            return
        self._is_incomplete, self._in_head, self._num_head_bytes = False, True, 0
        self._unset_timer()
        if self._ending.ended:
            self._close()  # nothing unread is left
            return
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._waiting.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It is the client's turn again, unless the next request is there."""
        super().on_response_complete()
        if not self._ending.ended and not self.pipeline and self.cycle.response_complete:
            self._wait()

    # --- how it ends -------------------------------------------------------------------------------------------------

    def _too_large(self) -> None:
        limit = f"the limit is {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
        self._refuse(HttpRefusal("headers_too_large", limit))

    def _too_slow(self) -> None:
        if self._is_answering():  # the one before it; whoever reads a stream may send what he likes
            self._set_timer(HEAD_S, self._too_slow)
            return
        self._refuse(HttpRefusal("too_slow", f"headers have to be here within {HEAD_S:.0f} s"))

    def _look_at_body(self) -> None:
        """A body may take its time as long as it comes."""
        late_s = self.loop.time() - self._since_s - BODY_S - self._num_body_bytes / BODY_BYTES_PER_S
        if late_s >= 0 and self.flow.read_paused:  # by us
            self._set_timer(BODY_S, self._look_at_body)
        elif late_s >= 0:
            per_s = f"{BODY_S:.0f} s and {BODY_BYTES_PER_S} bytes a second are the least"
            self._refuse(HttpRefusal("too_slow", f"the body did not come: {per_s}"))
        else:
            self._set_timer(-late_s, self._look_at_body)

    def _refuse(self, error: MillraceError) -> None:
        """Answer for the connection itself, and end it."""
        if self._ending.ended:
            return
        if self._is_answering():
            self.abort()  # it would be taken for the answer to what was asked before
            return
        self._socket.write(_bytes(refused(getattr(self, "url", b"").decode("latin-1"), error)))
        if self.cycle is not None and not self.cycle.response_complete:  # whoever waits for the body waits no more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._is_incomplete = True  # there may be more of it
        self._end()

    def _is_answering(self) -> bool:
        """Whether an answer is on its way, or being made for a request that is here as a whole."""
        if self.cycle is None or (self.cycle.response_complete and not self.pipeline):
            return False
        return bool(self.pipeline) or self.cycle.response_started or not self._is_incomplete

    def _end(self) -> None:
        """Close, as gently as the client deserves."""
        if self._ending.ended:
            return
        self._ending.ended = True
        self._unset_timer()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.abort()  # cut in the middle, for its client takes nothing
        elif self._is_incomplete:
            self._wait()
            self.flow.resume_reading()
            self._set_timer(LINGER_S, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self._waiting.pop(self, None)
        self._socket.close()
        self._set_timer(LAST_BYTES_S, self._socket.abort)

    def _set_timer(self, after_s: float, then: Callable[[], None]) -> None:
        self._unset_timer()
        self._timer = self.loop.call_later(after_s, then)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _nothing(*_: object) -> None:
    pass


def _bytes(response: Response) -> bytes:
    """A response as it goes over the wire, the last of its connection."""
    lines = [
        f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode(),
        b"connection: close",
    ]
    lines += [name + b": " + value for name, value in response.raw_headers if name != b"connection"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
