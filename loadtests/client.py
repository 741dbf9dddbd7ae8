"""A streaming client that costs little: raw sockets, no HTTP library, a time stamp for every token.

Written for measuring: at a few thousand tokens a second on two cores, an ordinary client would take more processor
time than the server it measures.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Stream:
    """One finished stream: when it was sent and when each token arrived (monotonic seconds), and how it ended."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


def note(result: Stream, event: dict[str, Any]) -> None:
    """Write down an event of the native route. Raises `RuntimeError` for an error event."""
    if "error" in event:
        raise RuntimeError(f"error event: {event['error']}")
    now = time.monotonic()
    for choice in event["choices"]:
        result.token_ids += choice["token_ids"]
        result.token_times_s += [now] * len(choice["token_ids"])
        result.finish_reason = choice["finish_reason"] or result.finish_reason


async def stream(
    host: str,
    port: int,
    body: dict[str, object],
    path: str = "/generate",
    note: Callable[[Stream, dict[str, Any]], None] = note,
) -> Stream:
    """POST `body` with `stream: true` and read the events to their end; `note` knows what they look like.

    Raises `RuntimeError` on another status than 200 and on a stream without a terminal event.
    """
    payload = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        result = Stream(sent_s=time.monotonic())
        writer.write(head.encode() + payload)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"status {status!r}: {(await reader.read(4096))[-500:]!r}")
        async for line in reader:  # chunk sizes and headers are lines too: only `data:` lines matter
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            note(result, json.loads(line[6:]))
        if result.finish_reason is None:
            raise RuntimeError("the stream ended without a terminal event")
        return result
    finally:
        writer.close()


def wait_until_ready(port: int, within_s: float = 30.0) -> None:
    """Until a server on this machine says so. Raises `RuntimeError`."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                probe.sendall(b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                if b" 200" in probe.recv(64):
                    return
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready after {within_s:.0f} s")
