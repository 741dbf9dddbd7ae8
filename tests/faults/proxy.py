"""A TCP proxy that stands before Redis (or anything) and fails on command. It runs in a thread with a loop of its own,
so that nothing a test does holds it up, and the other way round.

It forwards bytes and knows no protocol; that a chunk read from the server is a reply is all it assumes.
"""

import asyncio
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

CHUNK_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class _Pair:
    """One client's connection and ours to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    asked: bytes = b""  # since the last reply

    def reset(self) -> None:
        """Both ends see a reset, not an orderly end."""
        for writer in (self.client, self.server):
            raw: socket.socket | None = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


@dataclass(slots=True)
class _Faults:
    drops: int = 0
    drops_after: bytes = b""
    dropped: int = 0
    hole_until_s: float = 0.0
    refusing: bool = False
    pairs: set[_Pair] = field(default_factory=set)


class Proxy:
    """`with Proxy(port) as proxy`, then connect to `proxy.port`. The plain attributes may be set at any time."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.target_port, self.port = target_port, 0
        self.delay_s = 0.0  # for each chunk, in each direction
        self.jitter_s = 0.0  # up to so much more
        self.reset_share = 0.0  # of chunks, at random, that a reset comes in place of
        self.split = False  # one byte at a time
        self._faults, self._random = _Faults(), random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> "Proxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def num_open(self) -> int:
        """Connections through it now."""
        return len(self._faults.pairs)

    @property
    def num_dropped(self) -> int:
        """Replies swallowed so far."""
        return self._faults.dropped

    def reset(self) -> None:
        """Break every connection now."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def drop_replies(self, count: int, after: bytes = b"") -> None:
        """Swallow the next `count` replies, each with its connection: the server has executed what it was asked, and
        nobody hears of it. `after`: only replies to what contains these bytes."""
        self._faults.drops_after, self._faults.drops = after, count

    def black_hole(self, duration_s: float) -> None:
        """For so long nothing comes through and nothing is refused; afterwards all of it arrives, late."""
        self._faults.hole_until_s = time.monotonic() + duration_s

    def refuse(self, refusing: bool) -> None:
        """Take no new connections (they are reset at once), or take them again."""
        self._faults.refusing = refusing

    # --- in the thread -----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._listener = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._listener.close()
        self._reset_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset_all(self) -> None:
        for pair in list(self._faults.pairs):
            pair.reset()

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._hole()
            if self._faults.refusing:
                writer.transport.abort()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(writer, back)
        for end in (writer, back):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._faults.pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, back, pair, is_reply=False))
                both.create_task(self._pump(there, writer, pair, is_reply=True))
        except* OSError:
            pass  # the other side went away, which is what proxies are told first
        finally:
            self._faults.pairs.discard(pair)
            writer.close()
            back.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair, is_reply: bool
    ) -> None:
        """One direction, to its end; then the whole pair ends."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.create_task(self._send(late, writer))
        try:
            while data := await reader.read(CHUNK_BYTES):
                if (is_reply and self._drops(pair)) or self._random.random() < self.reset_share:
                    pair.reset()
                    raise ConnectionResetError("on command")
                pair.asked = b"" if is_reply else pair.asked[-CHUNK_BYTES:] + data
                delay_s = self.delay_s + self._random.random() * self.jitter_s
                late.put_nowait((time.monotonic() + delay_s, data))
            late.put_nowait((0.0, b""))
            await sender
            raise ConnectionResetError("the end")
        finally:
            sender.cancel()

    async def _send(self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, data = await late.get()
            if not data:
                return
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await self._hole()
            for part in (data[i : i + 1] for i in range(len(data))) if self.split else (data,):
                writer.write(part)
                await writer.drain()

    async def _hole(self) -> None:
        await asyncio.sleep(max(0.0, self._faults.hole_until_s - time.monotonic()))

    def _drops(self, pair: _Pair) -> bool:
        faults = self._faults
        if faults.drops < 1 or faults.drops_after not in pair.asked:
            return False
        faults.drops -= 1
        faults.dropped += 1
        return True
