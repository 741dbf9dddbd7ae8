"""One streamed exchange with a server, in its dialect: what is sent, what its events mean, and when tokens came.

Over gevent's sockets, which Locust runs on. A client here may leave in the middle, for good or to come back with the
last event's id. It keeps no statistics.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import gevent
import orjson
from geventhttpclient import HTTPClient

from loadtests.load.records import LEFT, Record

PATIENCE_S = 120.0  # without a byte
NUM_RETURNS = 5
UNENDED = "the stream had no end"


@dataclass(slots=True)
class Told:
    """What one event says: how many tokens it brought (in OpenAI's dialect 1 or 0: there an event is the smallest thing
    that can be timed), their text, and what is only in some."""

    num_tokens: int = 0
    text: str = ""
    num_prompt: int | None = None
    num_output: int | None = None
    ended: bool = False
    error: str | None = None


def native(event: dict[str, Any]) -> Told:
    """An event of `/generate`."""
    if "error" in event:
        return Told(error=str(event["error"].get("code", "error")))
    if usage := event.get("usage"):
        return Told(num_prompt=usage["prompt_tokens"], num_output=usage["completion_tokens"], ended=True)
    (choice,) = event["choices"]
    return Told(len(choice["token_ids"]), choice["text"])


def openai(event: dict[str, Any]) -> Told:
    """A chunk of completions or chats. An opening role without text is no token, nor is an empty text."""
    if error := event.get("error"):
        return Told(error=str(error.get("code") or error.get("type")) if isinstance(error, dict) else str(error))
    told = Told()
    if usage := event.get("usage"):
        told.num_prompt, told.num_output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or choice
        told.text += delta.get("content") or delta.get("text") or ""
        told.num_tokens = int(bool(told.text or delta.get("reasoning_content") or delta.get("tool_calls")))
        told.ended = choice.get("finish_reason") is not None
    return told


@dataclass(frozen=True, slots=True)
class Plan:
    """One request. `leaves_after` so many tokens the client goes; with `returns_after_s` it comes back then."""

    kind: str
    path: str
    body: Mapping[str, Any]
    reads: Callable[[dict[str, Any]], Told]
    due_s: float | None = None  # time of day; None is when it is sent
    leaves_after: int | None = None
    returns_after_s: float | None = None

    def record(self) -> Record:
        """One that begins now."""
        now_s = time.time()
        return Record(self.kind, now_s if self.due_s is None else self.due_s, now_s)


class Wire:
    """A client's connections to one server; each is used by one exchange at a time, and kept."""

    def __init__(self, url: str, num_connections: int = 1, api_key: str | None = None) -> None:
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._client = HTTPClient.from_url(
            url, concurrency=num_connections, network_timeout=PATIENCE_S, connection_timeout=10.0, headers=headers
        )

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A question with one JSON answer. Raises `RuntimeError` on another status than 200."""
        client = self._client
        response = client.get(path) if body is None else client.post(path, orjson.dumps(body))
        said = response.read()
        if response.status_code != 200:
            raise RuntimeError(f"{path}: status {response.status_code}: {bytes(said[:300])!r}")
        return orjson.loads(said)

    def exchange(self, plan: Plan, record: Record) -> str:
        """Do it, write into `record` what came of it, and return the text. What fails is the record's outcome; only
        `GreenletExit` is raised, where the run ends."""
        body = orjson.dumps({**plan.body, "stream": True})
        reading = _Reading(plan, record)
        try:
            reading.read(lambda: self._client.post(plan.path, body))
            while reading.comes_back and record.num_returns < NUM_RETURNS:
                gevent.sleep(plan.returns_after_s or 0)
                record.num_returns += 1
                reading.read(lambda: self._client.get(reading.url, {"Last-Event-ID": reading.last_id}))
        except RuntimeError as error:  # our own, and that of a pool that is closed
            record.outcome = str(error)
        except (OSError, ValueError, KeyError, HTTPException) as error:
            record.outcome = type(error).__name__
        except gevent.GreenletExit:
            record.outcome = "not done when the run ended"
            raise
        return reading.text

    def close(self) -> None:
        """All connections."""
        self._client.close()


class _Reading:
    """The events of one exchange as they come, over all its connections."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self._plan, self._record = plan, record
        self._began_s = self._last_s = time.perf_counter()
        self._num_tokens, self._ended = 0, False
        self.text, self.url, self.last_id, self.comes_back = "", "", "", False

    def read(self, opened: Callable[[], Any]) -> None:
        """One connection, until the stream ends or the client leaves."""
        response, self.comes_back, self._record.outcome = opened(), False, UNENDED
        try:
            if response.status_code != 200:
                response.read()
                self._record.outcome = f"status {response.status_code}"
                return
            self.url = response.get("content-location") or self.url
            for line in _lines(response):
                if self._takes(line):
                    break
        finally:
            response.release()  # which hangs up where the body was not read to its end

    def _takes(self, line: bytes) -> bool:
        """Whether the connection is done with."""
        if line.startswith(b"id:"):
            self._heed_id(line[3:].strip().decode())
        if not line.startswith(b"data:"):
            return False
        data = line[5:].strip()
        if data == b"[DONE]":
            self._end("ok" if self._ended else "[DONE] without an end")
            return False  # the body's end comes now, and leaves the connection usable
        told = self._plan.reads(orjson.loads(data))
        self._note(told)
        if told.error is not None:
            self._end(f"error event: {told.error}")
            return True
        leaves = self._plan.leaves_after
        if leaves is None or self._ended or self._record.num_returns or self._num_tokens < leaves:
            return False
        self.comes_back = self._plan.returns_after_s is not None and bool(self.last_id and self.url)
        self._record.outcome = LEFT
        return True

    def _note(self, told: Told) -> None:
        record, now_s = self._record, time.perf_counter()
        self._ended = self._ended or told.ended
        self.text += told.text
        record.num_prompt = told.num_prompt or record.num_prompt
        if told.num_tokens and not record.num_returns:  # after a return they come in one burst
            if record.ttft_s is None:
                record.ttft_s = now_s - self._began_s
            else:
                record.gaps_s += [(now_s - self._last_s) / told.num_tokens] * told.num_tokens
            self._last_s = now_s
        self._num_tokens += told.num_tokens
        record.num_output = told.num_output or max(record.num_output, self._num_tokens)

    def _heed_id(self, id: str) -> None:
        """Ids that count tokens must go up: a step back is a token that came twice."""
        count, last = id.rpartition(":")[2], self.last_id.rpartition(":")[2]
        if count.isdecimal() and last.isdecimal() and int(count) < int(last):
            raise RuntimeError(f"event {id} after {self.last_id}")
        self.last_id = id

    def _end(self, outcome: str) -> None:
        self._record.outcome = outcome
        self._record.e2e_s = time.perf_counter() - self._began_s


def _lines(response: Any) -> Iterator[bytes]:
    """Lines as they come. Raises `ConnectionError` where the body is cut."""
    while line := response.readline(b"\n"):
        yield line
    if not response.message_complete:
        raise ConnectionError("the stream was cut")
