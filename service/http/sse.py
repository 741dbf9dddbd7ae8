"""Server-sent events: framing, event ids, the end of a stream, and what happens when its reader goes or stalls.

It knows no JSON and no dialect. Lines end in LF, since many clients split on LF LF; a frame is always whole. The id of
an event is `<request id>:<tokens so far>`, with several choices a count for each: `<id>:12,9`. After the one terminal
event comes `data: [DONE]`, whatever has happened before. Only where this process stops and the request goes on, the
stream just ends: its reader shall come back with the last id, and `retry` says how soon.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Receive, Scope, Send

from service.errors import Handover
from service.http.generation import Generation
from service.http.reply import Native

PING_S = 10  # a comment at least this often, so that proxies and half-open connections are noticed
STUCK_S = 30  # a client that takes nothing for so long is cut
RETRY = b"retry: 1000\n"  # milliseconds
HANDED_OVER = b": this server stops; read on with the last event id\nretry: 200\n\n"
DONE = b"data: [DONE]\n\n"
HEAD = "millrace.head"  # in a scope: the request was a HEAD before it was made a GET

logger = logging.getLogger(__name__)


async def events(generation: Generation, dialect: Native) -> AsyncGenerator[bytes, None]:
    """Frames: those of one log entry in one write, then the terminal event and `[DONE]`."""
    counts = generation.positions()
    id, opening, is_one = generation.intake.id.encode(), RETRY, len(counts) == 1

    def frame(data: bytes) -> bytes:
        told = b"%d" % counts[0] if is_one else b",".join([b"%d" % count for count in counts])
        return b"id: %b:%b\ndata: %b\n\n" % (id, told, data)

    try:
        async with aclosing(generation.pieces()) as batches:
            async for pieces in batches:
                frames = [opening]
                for piece in pieces:
                    counts[piece.choice] += 1
                    frames.append(frame(dialect.delta(piece)))
                yield b"".join(frames)
                opening = b""
    except Handover:
        generation.hand_over()
        yield HANDED_OVER
        return
    except Exception as error:
        generation.fail(error)
    counts = generation.positions()
    yield opening + frame(dialect.terminal(generation)) + DONE


class EventStream(EventSourceResponse):
    """A generation as a response. However it ends, even before its first byte, the generation is closed.

    sse-starlette would end every stream half a second after SIGTERM, without a last event. An endless grace period
    turns that off for this response alone: streams end because what they follow ends, and the drain sees to that. It
    would also open a cancel scope with a timer for each event, at more than the cost of making it; here one timer for
    the whole stream looks how long the send has taken that is under way.
    """

    def __init__(self, generation: Generation, dialect: Native) -> None:
        super().__init__(
            events(generation, dialect),
            headers={"Content-Location": f"/generate/{generation.intake.id}"},  # known before there is an event
            sep="\n",
            ping=PING_S,
            ping_message_factory=lambda: ServerSentEvent(comment="waiting", sep="\n"),
            send_timeout=STUCK_S,
            shutdown_grace_period=math.inf,
        )
        self._generation = generation
        self._loop = asyncio.get_running_loop()
        self._sending_since_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, or until the client has gone. The events may never start, so cleaning up is here."""
        try:
            with anyio.CancelScope() as life:
                self._watch(life)
                await super().__call__({**scope, "method": "HEAD"} if scope.get(HEAD) else scope, receive, send)
            if life.cancelled_caught:
                logger.info("request %s: its client took nothing for %d s", self._generation.intake.id, STUCK_S)
        except asyncio.CancelledError:  # by the server: a client that leaves ends the stream without an exception
            self._generation.hand_over()
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._generation.close()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """The library's, without its timer."""
        self._sending_since_s = min(self._sending_since_s, self._loop.time())
        await send(message)
        self._sending_since_s = math.inf

    def _watch(self, life: anyio.CancelScope) -> None:
        """End it if a send takes too long; else look again when that could be."""
        now_s = self._loop.time()
        due_s = min(self._sending_since_s, now_s) + STUCK_S
        if due_s <= now_s:
            life.cancel()
        else:
            self._timer = self._loop.call_at(due_s, self._watch, life)
