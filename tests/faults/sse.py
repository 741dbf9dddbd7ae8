"""Reading an answer byte by byte: the head, the chunked body (RFC 9112, 7.1) and the event stream in it (WHATWG HTML
9.2.6). Strict: what the standards do not allow raises `Malformed`. Nothing is waited for here, and nothing is decided.
"""

import re
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")


class Malformed(Exception):
    """The bytes are not what their standard allows."""


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event. `id` is the last event id at that moment; `at_s` is the arrival of its last byte."""

    id: str
    name: str
    data: bytes
    at_s: float


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers; header names in lower case."""

    status: int
    headers: dict[str, str]


def parse_head(raw: bytes) -> Head:
    """Everything before the empty line."""
    first, *rest = raw.decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ", 2)
    if version != "HTTP/1.1" or not status.isdigit():
        raise Malformed(f"status line {first!r}")
    pairs = [line.partition(":") for line in rest if line]
    return Head(int(status), {name.lower(): value.strip() for name, _, value in pairs})


class Chunked:
    """A chunked body. `ended` is true once the last chunk and its empty line were read; before that it is cut off."""

    __slots__ = ("_buffer", "_left", "ended")

    def __init__(self) -> None:
        self._buffer = b""
        self._left = -1  # bytes of the current chunk, with its CR LF; -1: a size line comes next
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The payload that this brings."""
        self._buffer += data
        parts = []
        while not self.ended:
            if self._left < 0:
                line, end, rest = self._buffer.partition(b"\r\n")
                if not end:
                    break
                if not SIZE.fullmatch(line):
                    raise Malformed(f"chunk size {line[:40]!r}")
                self._buffer, self._left = rest, int(line, 16) + 2
            if len(self._buffer) < self._left:
                break
            chunk, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
            if chunk[-2:] != b"\r\n":
                raise Malformed(f"a chunk that ends with {chunk[-2:]!r}")
            self.ended, self._left = len(chunk) == 2, -1
            parts.append(chunk[:-2])
        if self.ended and self._buffer:
            raise Malformed(f"bytes after the last chunk: {self._buffer[:40]!r}")
        return b"".join(parts)


class EventParser:
    """An event stream. What no empty line has ended is never dispatched."""

    __slots__ = ("_begun", "_buffer", "_data", "_name", "comments", "last_id", "retry_ms")

    def __init__(self, last_id: str = "") -> None:
        self._begun = False
        self._buffer = b""
        self._data: list[bytes] = []
        self._name = ""
        self.comments: list[bytes] = []
        self.last_id = last_id
        self.retry_ms: int | None = None

    def feed(self, payload: bytes, at_s: float) -> list[Event]:
        """The events that this completes."""
        self._buffer += payload
        if not self._begun and len(self._buffer) >= 3:
            self._begun, self._buffer = True, self._buffer.removeprefix(b"\xef\xbb\xbf")
        # A CR at the very end may be the first half of CR LF: it waits for the next byte.
        held = b"\r" if self._buffer.endswith(b"\r") else b""
        *lines, rest = LINE_END.split(self._buffer[:-1] if held else self._buffer)
        self._buffer = rest + held
        events = []
        for line in lines:
            if line:
                self._field(line)
            else:
                events += self._dispatch(at_s)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        line.decode()  # the stream is UTF-8
        if not name:
            self.comments.append(value)
        elif name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value.decode()
        elif name == b"id" and b"\0" not in value:
            self.last_id = value.decode()
        elif name == b"retry" and value.isdigit():
            self.retry_ms = int(value)

    def _dispatch(self, at_s: float) -> list[Event]:
        data, name, self._data, self._name = b"\n".join(self._data), self._name, [], ""
        return [Event(self.last_id, name or "message", data, at_s)] if data else []
