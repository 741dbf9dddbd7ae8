"""Server-sent events: framing, event ids, the end of a stream, and what happens when its reader goes or stalls.

It knows no JSON and no dialect. Lines end in LF, since many clients split on LF LF; a frame is always whole. The id of
an event is `<request id>:<tokens so far>`, with several choices a count for each: `<id>:12,9`. At the end comes the
dialect's one terminal group, whatever has happened before. Only where this process stops and the request goes on, the
stream just ends: its reader shall come back with the last id, and `retry` says how soon. Readers of a dialect whose
clients never do are told an error, unless they have said that they will (`resumable`).

A comment is one line, without an empty one after it: to the parser of OpenAI's Python client that would be the end of
an event without data, once an event had an id, and it breaks on that.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from service.errors import Handover
from service.http.generation import Generation, Piece
from service.http.reply import Dialect, progress

PING_S = 10  # a comment at least this often, so that proxies and half-open connections are noticed
STUCK_S = 30  # a client that takes nothing for so long is cut
COMMENT = b": waiting\n"
RETRY = b"retry: 1000\n"  # milliseconds
HANDED_OVER = b": this server stops; read on with the last event id\nretry: 200\n\n"
HEAD = "millrace.head"  # in a scope: the request was a HEAD before it was made a GET
SEND = "millrace.send"  # in a scope: `send` as it was outside of what looks only at how a response begins

logger = logging.getLogger(__name__)


class Frames:
    """The events of one stream as bytes: each with its id, those of one log entry together, then the terminal group."""

    def __init__(self, generation: Generation, dialect: Dialect) -> None:
        self._generation, self._dialect, self._opening = generation, dialect, RETRY
        self._counts, self._seen = generation.positions(), [0] * len(generation.choices)
        self._head, self._is_one = b"id: %b:" % generation.intake.id.encode(), len(self._counts) == 1

    def first(self) -> bytes:
        """What comes before any token, perhaps nothing."""
        event = self._dialect.opening()
        return self._with_opening(self._frame(event)) if event else b""

    def of(self, pieces: Sequence[Piece]) -> bytes:
        """Those of some tokens, in order; of what the reader has, nothing."""
        counts, seen, frames = self._counts, self._seen, b""
        for piece in pieces:
            index, event = piece.choice, self._dialect.delta(piece)
            seen[index] += 1
            if seen[index] > counts[index]:
                counts[index] += 1
                if event:
                    frames += self._frame(event)
        return self._with_opening(frames) if frames and self._opening else frames

    def last(self) -> bytes:
        """The terminal group."""
        self._counts = self._generation.positions()
        return self._with_opening(self._frame(self._dialect.ending(self._generation)))

    def _frame(self, event: bytes) -> bytes:
        counts = self._counts
        if self._is_one:
            return b"%b%d\n%b" % (self._head, counts[0], event)
        return b"%b%b\n%b" % (self._head, b",".join([b"%d" % count for count in counts]), event)

    def _with_opening(self, frames: bytes) -> bytes:
        opening, self._opening = self._opening, b""
        return opening + frames


class EventStream(EventSourceResponse):
    """A generation as a response. However it ends, even before its first byte, the generation is closed.

    The headers and comments are sse-starlette's, the life is our own. The library's is four tasks for each stream and a
    cancel scope for each event: 23 KiB more memory a stream (of 58) and a third more time an event, measured with
    a thousand streams. Also it would end every stream half a second after SIGTERM, without a last event.
    """

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        headers: Mapping[str, str] | None = None,
        with_progress: bool = False,
    ) -> None:
        self._generation, self._frames = generation, Frames(generation, dialect)
        self._dialect, self._with_progress = dialect, with_progress
        # A client that is cut off before the first event needs to know where to go on.
        super().__init__(iter(()), headers={"Content-Location": dialect.location, **(headers or {})})
        self._loop = asyncio.get_running_loop()
        self._life = asyncio.timeout(None)  # runs out when the client leaves or takes nothing
        self._sending_since_s: float | None = None
        self._others: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, or until the client has gone. The events may never start, so cleaning up is here."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if not scope.get(HEAD):
                await self._stream(receive, scope.get(SEND, send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.debug("request %s: its client left", self._generation.intake.id)
        except asyncio.CancelledError:  # by the server, and no leaving of the client's
            self._generation.hand_over()
            raise
        finally:
            await self._generation.close()

    async def _stream(self, receive: Receive, send: Send) -> None:
        async with self._life:
            self._spawn(self._listen(receive))
            if self._with_progress:
                self._spawn(self._tell_progress(send))
            self._timer = self._loop.call_later(PING_S, self._look, send)
            try:
                await self._loop.create_task(self._pass_on(send))
            finally:
                self._timer.cancel()
                for task in self._others:
                    task.cancel()

    async def _pass_on(self, send: Send) -> None:
        """A task of its own, for a token wakes every coroutine from the task's first to the one that waits for it, and
        below the framework's there are two dozen."""
        generation, frames = self._generation, self._frames
        if first := frames.first():
            await self._send(send, first)
        try:
            async with aclosing(generation.pieces()) as batches:
                async for pieces in batches:
                    if body := frames.of(pieces):
                        await self._send(send, body)
        except Handover as handover:
            told = self._dialect.interruption(handover) if generation.cancels else b""
            generation.hand_over()
            await self._send(send, told or HANDED_OVER)
            return
        except Exception as error:
            generation.fail(error)
        await self._send(send, frames.last())

    async def _send(self, send: Send, body: bytes) -> None:
        if self._sending_since_s is None:
            self._sending_since_s = self._loop.time()
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._sending_since_s = None

    async def _tell_progress(self, send: Send) -> None:
        """While there is no token. What fails here is not the client's concern: its events tell what matters."""
        try:
            async with aclosing(self._generation.standings()) as standings:
                async for standing in standings:
                    await self._send(send, progress(standing))
        except Exception as error:
            logger.warning("request %s: its progress can't be told", self._generation.intake.id, exc_info=error)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end()

    def _look(self, send: Send) -> None:
        """Now and then: write a comment if nothing is on its way, else see how long it has been."""
        now_s, since_s = self._loop.time(), self._sending_since_s
        if since_s is None:
            self._spawn(self._send(send, COMMENT))
        elif now_s >= since_s + STUCK_S:
            logger.info("request %s: its client took nothing for %d s", self._generation.intake.id, STUCK_S)
            self._end()
            return
        due_s = now_s + PING_S if since_s is None else min(now_s + PING_S, since_s + STUCK_S)
        self._timer = self._loop.call_at(due_s, self._look, send)

    def _end(self) -> None:
        if not self._life.expired():  # for another reason
            self._life.reschedule(self._loop.time())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
