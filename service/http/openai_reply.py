"""The dialects of `/v1/completions` and `/v1/chat/completions`: chunks, whole answers, and how they end.

A chunk for every token that brings something, the role with the first one. The end is told in chunks of its own: what
was held back, then each choice's `finish_reason`, which is `stop`, `length` or `tool_calls` and nothing else, then the
usage if it was asked for; or one `error` for all of it, since OpenAI has no other word for a timeout, a cancellation or
a failure. It knows no queue and no event ids. What does not change within a request is encoded once.
"""

import hashlib
from collections.abc import Sequence

import orjson
from starlette.responses import Response

from model.request import Finish, FinishReason, TokenLogprob
from model.tokenizer import Tokenizer
from service.errors import Cancelled, MillraceError, TimedOut
from service.http.generation import Choice, Generation, Piece
from service.http.intake import Intake
from service.http.openai_asked import Wishes
from service.http.openai_errors import openai_error, openai_response
from service.http.openai_tools import CONTROL, Call, CallFinder
from service.http.reply import DONE, logprobs_of

LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON lacks
CALL_ID_CHARS = 9  # Mistral's templates take no other length


class _Dialect:
    """What both have in common: the frame around a choice, the usage, and the end."""

    path = ""
    answer_object, chunk_object = "", ""

    def __init__(self, intake: Intake, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._wishes = tokenizer, Wishes.of(intake.group[0].about)
        self.location = f"{self.path}/{intake.id}"
        self._with_logprobs = intake.group[0].sampling.num_logprobs is not None
        self._ends = [frozenset(request.sampling.stop_token_ids) for request in intake.group]
        self._id, self._answers = intake.id, len(intake.group) // intake.group[0].num_prompts
        self._num_prompt = sum(len(request.asked_ids) for request in intake.group[:: self._answers])
        self._same = {"id": intake.id, "created": intake.created, "model": intake.model}
        same = orjson.dumps(self._same | {"object": self.chunk_object})[:-1]
        self._head, self._usage_head = b"data: " + same + b',"choices":[', b"data: " + same
        self._tail = b'],"usage":null}\n\n' if self._wishes.usage else b"]}\n\n"
        self._num_tokens = 0

    def failure(self, generation: Generation) -> MillraceError | None:
        """Of any of the choices: there is no answer with half of them."""
        return next((error for choice in generation.choices if (error := failure_of(choice.finish))), None)

    def refusal(self, error: MillraceError) -> Response:
        """In OpenAI's words."""
        return openai_response(error)

    def opening(self) -> bytes:
        """Nothing: the role comes with the first token."""
        return b""

    def ending(self, generation: Generation) -> bytes:
        """The rest, the finish, the usage, or the error that takes their place; and `[DONE]`."""
        failure = self.failure(generation)
        if failure is not None:
            return _failed(failure)
        ends = b"".join(self._end(choice) for choice in generation.choices)
        return ends + (self._usage(generation) if self._wishes.usage else b"") + DONE

    def interruption(self, error: MillraceError) -> bytes:
        """An error: OpenAI's clients know no way back into a stream."""
        return _failed(error)

    def _end(self, choice: Choice) -> bytes:
        raise NotImplementedError

    def _chunk(self, choice: bytes) -> bytes:
        if self._wishes.usage_always:
            return b'%b%b],"usage":%b}\n\n' % (self._head, choice, self._usage_so_far())
        return self._head + choice + self._tail

    def _usage_so_far(self) -> bytes:
        total = self._num_prompt + self._num_tokens
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            self._num_prompt,
            self._num_tokens,
            total,
        )

    def _usage(self, generation: Generation) -> bytes:
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._usage_head, orjson.dumps(usage_of(generation)))

    def _is_end(self, piece: Piece) -> bool:
        """A token that ends the answer is no part of it, and neither is its log-probability."""
        return piece.token_id in self._ends[piece.choice]


class Completion(_Dialect):
    """Of one request to `/v1/completions`."""

    path, answer_object, chunk_object = "/v1/completions", "text_completion", "text_completion"

    def delta(self, piece: Piece) -> bytes:
        """This is the hot path: only what the token changes is encoded."""
        self._num_tokens += 1
        if not (piece.text or self._with_logprobs or self._wishes.usage_always):
            return b""
        return self._chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}'
            % (piece.choice, orjson.dumps(piece.text), self._logprobs([piece]))
        )

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """All of the pieces' text."""
        choices = []
        for choice in generation.choices:
            own = [piece for piece in pieces if piece.choice == choice.index]
            about = {"index": choice.index, "text": "".join(piece.text for piece in own) + choice.held_back}
            told = orjson.Fragment(self._logprobs(own))
            choices.append(about | {"logprobs": told, **_finish(choice)})
        return orjson.dumps(
            self._same | {"object": self.answer_object, "choices": choices, "usage": usage_of(generation)}
        )

    def _end(self, choice: Choice) -> bytes:
        rest = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}'
        held = self._chunk(rest % (choice.index, orjson.dumps(choice.held_back))) if choice.held_back else b""
        about = {"index": choice.index, "text": "", "logprobs": None}
        return held + self._chunk(orjson.dumps(about | _finish(choice)))

    def _logprobs(self, pieces: list[Piece]) -> bytes:
        if not self._with_logprobs:
            return b"null"
        known = [_bounded(piece) for piece in pieces if not self._is_end(piece)]
        return orjson.dumps(logprobs_of(self._tokenizer, known))


class Chat(_Dialect):
    """Of one request to `/v1/chat/completions`."""

    path, answer_object, chunk_object = "/v1/chat/completions", "chat.completion", "chat.completion.chunk"

    def __init__(self, intake: Intake, tokenizer: Tokenizer) -> None:
        super().__init__(intake, tokenizer)
        self._messages = [_Message(intake.id, i, self._wishes) for i in range(len(intake.group))]
        self._with_tools = bool(self._wishes.tools)

    def delta(self, piece: Piece) -> bytes:
        """This is the hot path: only what the token changes is encoded."""
        self._num_tokens += 1
        message = self._messages[piece.choice]
        is_first, message.is_begun = not message.is_begun, True
        text = piece.text
        if self._with_tools:
            parts = message.add(self._text(piece))
            if not all(isinstance(part, str) for part in parts):
                return self._with_calls(piece.choice, parts, is_first, self._logprobs([piece]))
            text = "".join(map(str, parts))
        if not (text or is_first or self._with_logprobs or self._wishes.usage_always):
            return b""
        role = b'"role":"assistant",' if is_first else b""
        return self._chunk(
            b'{"index":%d,"delta":{%b"content":%b},"logprobs":%b,"finish_reason":null}'
            % (piece.choice, role, orjson.dumps(text), self._logprobs([piece]))
        )

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """All of the pieces' text, and the calls in it."""
        choices = []
        for choice, message in zip(generation.choices, self._messages, strict=True):
            own = [piece for piece in pieces if piece.choice == choice.index]
            parts = [part for piece in own for part in message.add(self._text(piece))]
            parts += message.add(choice.held_back) + message.end()
            told: dict[str, object] = {"role": "assistant", "content": "".join(p for p in parts if isinstance(p, str))}
            calls = [part for part in parts if isinstance(part, dict)]
            if calls:
                calls = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
                told = {"role": "assistant", "content": told["content"] or None, "tool_calls": calls}
            about = {"index": choice.index, "message": told, "logprobs": orjson.Fragment(self._logprobs(own))}
            choices.append(about | _finish(choice, bool(calls)))
        return orjson.dumps(
            self._same | {"object": self.answer_object, "choices": choices, "usage": usage_of(generation)}
        )

    def _text(self, piece: Piece) -> str:
        """The piece's, and where calls may come also that of the control tokens around them, which have none."""
        if self._with_tools and not piece.text and not self._is_end(piece):
            name = self._tokenizer.token_text(piece.token_id)
            return name if name in CONTROL else ""
        return piece.text

    def _with_calls(self, index: int, parts: "list[str | dict[str, object]]", is_first: bool, logprobs: bytes) -> bytes:
        """Chunks for what has come, one for text and one for each call; one even for nothing, if it tells anything."""
        deltas: list[dict[str, object]] = []
        text = "".join(part for part in parts if isinstance(part, str))
        if text or is_first or self._with_logprobs or self._wishes.usage_always:
            deltas.append({"content": text})
        deltas += [{"tool_calls": [part]} for part in parts if isinstance(part, dict)]
        if is_first:
            deltas[0] = {"role": "assistant", **deltas[0]}
        chunks = []
        for delta in deltas:
            about = {"index": index, "delta": delta, "logprobs": orjson.Fragment(logprobs), "finish_reason": None}
            chunks.append(self._chunk(orjson.dumps(about)))
            logprobs = b"null"
        return b"".join(chunks)

    def _end(self, choice: Choice) -> bytes:
        message = self._messages[choice.index]
        rest = message.add(choice.held_back) + message.end()
        is_first, message.is_begun = not message.is_begun, True
        held = self._with_calls(choice.index, rest, is_first, b"null") if rest or is_first else b""
        about = {"index": choice.index, "delta": {}, "logprobs": None, **_finish(choice, message.num_calls > 0)}
        return held + self._chunk(orjson.dumps(about))

    def _logprobs(self, pieces: list[Piece]) -> bytes:
        if not self._with_logprobs:
            return b"null"
        told = [self._logprob(p.token_id, p.logprob) for p in pieces if p.logprob is not None and not self._is_end(p)]
        return orjson.dumps({"content": told, "refusal": None})

    def _logprob(self, token_id: int, logprob: TokenLogprob) -> dict[str, object]:
        top = [self._token(top_id, value) for top_id, value in logprob.top]
        return self._token(token_id, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, object]:
        piece = self._tokenizer.token_bytes(token_id)
        text = self._tokenizer.token_text(token_id)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(piece)}


class _Message:
    """One choice of a chat: its text with the calls found in it, and whether its first chunk is out."""

    def __init__(self, id: str, index: int, wishes: Wishes) -> None:
        self._name, self._several = f"{id}.{index}", wishes.several_calls
        self._finder = CallFinder(wishes.tools) if wishes.tools else None
        self.is_begun, self.num_calls = False, 0

    def add(self, text: str) -> list[str | dict[str, object]]:
        """What is certain with it: text, and calls as OpenAI writes them."""
        if self._finder is None:
            return [text] if text else []
        return self._told(self._finder.push(text))

    def end(self) -> list[str | dict[str, object]]:
        """The rest."""
        return [] if self._finder is None else self._told(self._finder.finish())

    def _told(self, parts: list[str | Call]) -> list[str | dict[str, object]]:
        told: list[str | dict[str, object]] = []
        for part in parts:
            if isinstance(part, str):
                told.append(part)
            elif self._several or not self.num_calls:
                id = hashlib.sha256(f"{self._name}.{self.num_calls}".encode()).hexdigest()[:CALL_ID_CHARS]
                function = {"name": part.name, "arguments": part.arguments}
                told.append({"index": self.num_calls, "id": id, "type": "function", "function": function})
                self.num_calls += 1
        return told


def _bounded(piece: Piece) -> Piece:
    """With log-probabilities that JSON can hold."""
    if piece.logprob is None:
        return piece
    top = tuple((id, max(value, LEAST_LOGPROB)) for id, value in piece.logprob.top)
    return piece._replace(logprob=TokenLogprob(max(piece.logprob.logprob, LEAST_LOGPROB), top))


def _failed(error: MillraceError) -> bytes:
    return b"data: %b\n\n%b" % (orjson.dumps(openai_error(error)), DONE)


def usage_of(generation: Generation) -> dict[str, object]:
    """In OpenAI's words."""
    usage = generation.usage()
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def failure_of(finish: Finish | None) -> MillraceError | None:
    """What OpenAI has no finish reason for."""
    reason = finish.reason if finish else FinishReason.ERROR
    match reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.TIMEOUT:
            limit = f": {finish.stop_reason}" if finish and finish.stop_reason else ""
            return TimedOut(f"the time is up{limit}")
        case FinishReason.CANCELLED:
            return Cancelled("the request was cancelled by its id")
    return MillraceError((finish and finish.error) or "internal error")


def _finish(choice: Choice, has_calls: bool = False) -> dict[str, object]:
    """`stop_reason`, which string or token it was, is our own word."""
    finish = choice.finish
    assert finish is not None
    is_call = has_calls and finish.reason is FinishReason.STOP
    return {"finish_reason": "tool_calls" if is_call else finish.reason.value, "stop_reason": finish.stop_reason}
