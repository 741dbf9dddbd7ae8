"""The dialect of `/v1/responses`: the response object, and the numbered events of a stream that make it up.

The events are a function of the log: whoever writes them again begins with the first token, counts, and says nothing
until the number that its reader has is passed. One opens the output with the first token; each token with text is a
delta; a call is told once it is whole; and the last event carries the whole response. It knows no queue. What OpenAI
has no word for is told by the nearest: a response that was cancelled, or whose time was up, ends as `response.failed`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from model.request import FinishReason
from model.tokenizer import Tokenizer
from service.errors import MillraceError
from service.http.generation import Choice, Generation, Piece
from service.http.intake import Intake
from service.http.openai_errors import openai_response
from service.http.openai_reply import failure_of
from service.http.openai_tools import CONTROL, Call, CallFinder
from service.http.responses_asked import Told

CALL_ID_CHARS = 24
Fields = dict[str, Any]


class Responses:
    """Of one request. `after`: the number of the last event that a reader has, -1 for none."""

    def __init__(self, intake: Intake, tokenizer: Tokenizer, after: int = -1) -> None:
        self._intake, self._tokenizer, self._after = intake, tokenizer, after
        self._told = Told.of(intake.group[0].about)
        self.location = f"/v1/responses/{intake.id}"
        self._finder = CallFinder(self._told.calls) if self._told.calls else None
        self._stop_ids = frozenset(intake.group[0].sampling.stop_token_ids)
        self._name = intake.id.rpartition("_")[2]
        self._number = -1  # of the last event
        self._items: list[Fields] = []
        self._texts: list[str] = []  # of the message that is open
        self._is_open = False
        self._num_calls = 0
        self._delta_head = self._delta_tail = b""  # of the events of the open message

    # --- the stream --------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The response as it begins, twice: so wants it the protocol."""
        begun = self.object("in_progress", None)
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def delta(self, piece: Piece) -> bytes:
        """This is the hot path where no call can come: only what the token changes is encoded."""
        if self._finder is None:
            if self._is_open:
                return self._say(piece.text) if piece.text else b""
            return self._begin_message() + (self._say(piece.text) if piece.text else b"")
        return self._take(self._finder.push(self._text(piece)))

    def ending(self, generation: Generation) -> bytes:
        """What was held back, the ends of what is open, and the one terminal event, which is told even to a reader who
        has it."""
        choice = generation.choices[0]
        events, status = self._rest(choice), _status(choice)
        if status in ("completed", "incomplete"):
            events += self._begin_message() if not self._items else b""
            events += self._end_message(status)
        self._after = min(self._after, self._number)
        kind = status if status in ("completed", "incomplete") else "failed"
        return events + self._event(f"response.{kind}", response=self.object(status, generation))

    def interruption(self, error: MillraceError) -> bytes:
        """Nothing: a client reads on by `starting_after`."""
        return b""

    def _take(self, parts: list[str | Call]) -> bytes:
        events = b""
        for part in parts:
            if isinstance(part, Call):
                if self._told.parallel_tool_calls or not self._num_calls:
                    events += self._end_message("completed") + self._tell_call(part)
            elif part:
                events += b"" if self._is_open else self._begin_message()
                events += self._say(part)
        return events

    def _rest(self, choice: Choice) -> bytes:
        held = choice.held_back
        if self._finder is None:
            opens = b"" if self._is_open or not held else self._begin_message()
            return opens + (self._say(held) if held else b"")
        return self._take(self._finder.push(held) + self._finder.finish())

    def _text(self, piece: Piece) -> str:
        """The piece's, and that of the control tokens around calls, which have none."""
        if not piece.text and piece.token_id not in self._stop_ids:
            name = self._tokenizer.token_text(piece.token_id)
            return name if name in CONTROL else ""
        return piece.text

    def _begin_message(self) -> bytes:
        index, id = len(self._items), f"msg_{self._name}{len(self._items):02d}"
        item = {"type": "message", "id": id, "status": "in_progress", "role": "assistant", "content": []}
        self._items.append(item)
        self._texts, self._is_open = [], True
        about = orjson.dumps({"item_id": id, "output_index": index, "content_index": 0, "logprobs": []})
        self._delta_head = (
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",%b,"sequence_number":'
            % about[1:-1]
        )
        added = self._event("response.output_item.added", output_index=index, item=item)
        return added + self._event("response.content_part.added", **self._place(), part=_part(""))

    def _say(self, text: str) -> bytes:
        self._texts.append(text)
        self._number += 1
        if self._number <= self._after:
            return b""
        return b'%b%d,"delta":%b}\n\n' % (self._delta_head, self._number, orjson.dumps(text))

    def _end_message(self, status: str) -> bytes:
        """Close the open message, if there is one."""
        if not self._is_open:
            return b""
        place, text = self._place(), "".join(self._texts)
        self._is_open = False
        done = self._event("response.output_text.done", **place, text=text, logprobs=[])
        done += self._event("response.content_part.done", **place, part=_part(text))
        self._items[-1] = self._items[-1] | {"status": status, "content": [_part(text)]}
        return done + self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])

    def _tell_call(self, call: Call) -> bytes:
        index, id = len(self._items), f"fc_{self._name}{len(self._items):02d}"
        call_id = "call_" + hashlib.sha256(f"{self._name}.{self._num_calls}".encode()).hexdigest()[:CALL_ID_CHARS]
        item = {"type": "function_call", "id": id, "call_id": call_id, "name": call.name, "arguments": ""}
        place, arguments = {"item_id": id, "output_index": index}, call.arguments
        self._items.append(item | {"arguments": arguments, "status": "completed"})
        self._num_calls += 1
        return (
            self._event("response.output_item.added", output_index=index, item=item | {"status": "in_progress"})
            + self._event("response.function_call_arguments.delta", **place, delta=arguments)
            + self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments)
            + self._event("response.output_item.done", output_index=index, item=self._items[-1])
        )

    def _place(self) -> Fields:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: object) -> bytes:
        self._number += 1
        if self._number <= self._after:
            return b""
        told = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), told)

    # --- in one piece ------------------------------------------------------------------------------------------------

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """The response, once it has ended."""
        self._gather(generation, pieces)
        return orjson.dumps(self.object(_status(generation.choices[0]), generation))

    def now(self, generation: Generation, pieces: Sequence[Piece], waits: bool, cancelled: bool = False) -> bytes:
        """The response as it stands. `cancelled`: it will end so, if it has not ended."""
        if generation.choices[0].finish is not None:
            return self.whole(generation, pieces)
        self._gather(generation, pieces)
        return orjson.dumps(self.object("cancelled" if cancelled else "queued" if waits else "in_progress", generation))

    def failure(self, generation: Generation) -> MillraceError | None:
        """What OpenAI has no status for."""
        return failure_of(generation.choices[0].finish)

    def refusal(self, error: MillraceError) -> Response:
        """In OpenAI's words."""
        return openai_response(error)

    def _gather(self, generation: Generation, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.delta(piece)
        if generation.choices[0].finish is not None:
            self._rest(generation.choices[0])
            if not self._items:
                self._begin_message()
            self._end_message("completed" if _status(generation.choices[0]) == "completed" else "incomplete")

    def object(self, status: str, generation: Generation | None) -> Fields:
        """The response object. None: it has just begun."""
        told, sampling = self._told, self._intake.group[0].sampling
        choice = None if generation is None else generation.choices[0]
        failure = failure_of(choice.finish) if choice and choice.finish else None
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._intake.id,
            "object": "response",
            "created_at": self._intake.created,
            "status": status,
            "background": told.background,
            "error": {"code": "server_error", "message": str(failure)} if failure and status == "failed" else None,
            "incomplete_details": incomplete,
            "instructions": told.instructions,
            "max_output_tokens": told.max_output_tokens,
            "metadata": told.metadata,
            "model": self._intake.model,
            "output": self._output(),
            "parallel_tool_calls": told.parallel_tool_calls,
            "previous_response_id": None,
            "store": told.store,
            "temperature": sampling.temperature,
            "text": told.text,
            "tool_choice": told.tool_choice,
            "tools": told.tools,
            "top_p": sampling.top_p,
            "truncation": told.truncation,
            "usage": None if generation is None or choice is None or choice.finish is None else _usage(generation),
            "user": told.user,
        }

    def _output(self) -> list[Fields]:
        """The items, the open one with its text so far."""
        if not self._is_open:
            return list(self._items)
        open_one = self._items[-1] | {"status": "incomplete", "content": [_part("".join(self._texts))]}
        return [*self._items[:-1], open_one]


def _part(text: str) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(choice: Choice) -> str:
    match choice.finish.reason if choice.finish else FinishReason.ERROR:
        case FinishReason.STOP:
            return "completed"
        case FinishReason.LENGTH:
            return "incomplete"
        case FinishReason.CANCELLED:
            return "cancelled"
    return "failed"


def _usage(generation: Generation) -> Fields:
    usage = generation.usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
