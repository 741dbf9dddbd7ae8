"""What a dialect is, and the native one's shapes: the whole answer, and the events of a stream. Bytes out, nothing
decided.

It knows JSON and field names; it knows no queue, no statuses and no event ids. Another dialect is another class with
the same methods. What does not change within a request is encoded once.

A native stream has one event for each token and then exactly one terminal event. The terminal event names every choice
with its `finish_reason` and, as `text`, what was held back until the end; it carries `usage` and `timings`, and if
nothing came to a good end `error` as well, a problem object. A choice that ends before the others is silent until then.

Every event is a function of the stored request, the ids, their log-probabilities and the terminal entry, so that any
process writes the same bytes at any time.
"""

from collections.abc import Sequence
from typing import Protocol

import orjson
from starlette.responses import Response

from model.request import TokenLogprob
from model.tokenizer import Tokenizer
from service.errors import MillraceError
from service.http.generation import Choice, Generation, Piece, Standing
from service.http.intake import Intake
from service.http.problems import problem, problem_response

DONE = b"data: [DONE]\n\n"


def progress(standing: Standing) -> bytes:
    """How a request stands, as a comment in any stream: programs that don't know it pass over it."""
    told = {
        "position": standing.position,
        "computed_tokens": standing.num_computed,
        "prompt_tokens": standing.num_prompt,
    }
    return b": progress %b\n" % orjson.dumps(told)


class Dialect(Protocol):
    """How one request is answered in one API's words. An event is everything of it but its id: `data: ...` and the
    lines that go with it, the empty line included."""

    location: str  # the URL at which the answer can be read again

    def opening(self) -> bytes:
        """The events that come at once, before any token, joined; none is b""."""
        ...

    def delta(self, piece: Piece) -> bytes:
        """The events that one token brings, joined; none is b"". It is told of every token from the first on, those
        that a reader who came back has already included."""
        ...

    def ending(self, generation: Generation) -> bytes:
        """What ends a stream, whatever has happened: the one terminal group, after which nothing comes."""
        ...

    def interruption(self, error: MillraceError) -> bytes:
        """What ends a stream that this process leaves while its request goes on; b"" where clients of this dialect come
        back with the last event id."""
        ...

    def failure(self, generation: Generation) -> MillraceError | None:
        """Why a whole answer can't be given, when it has ended."""
        ...

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """The unstreamed answer: what the events of a stream would add up to."""
        ...

    def refusal(self, error: MillraceError) -> Response:
        """An error in place of a whole answer."""
        ...


class Native:
    """The dialect of `/generate`, for one request."""

    def __init__(self, intake: Intake, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.location = tokenizer, f"/generate/{intake.id}"
        self._with_logprobs = intake.group[0].sampling.num_logprobs is not None
        self._same = {"id": intake.id, "model": intake.model, "created": intake.created, "seed": intake.seed}
        self._head = b"data: " + orjson.dumps(self._same)[:-1] + b',"choices":[{"index":'

    def opening(self) -> bytes:
        return b""

    def delta(self, piece: Piece) -> bytes:
        """This is the hot path: only what the token changes is encoded."""
        logprobs = orjson.dumps(logprobs_of(self._tokenizer, [piece])) if self._with_logprobs else b"null"
        return b'%b%d,"text":%b,"token_ids":[%d],"logprobs":%b,"finish_reason":null,"stop_reason":null}]}\n\n' % (
            self._head,
            piece.choice,
            orjson.dumps(piece.text),
            piece.token_id,
            logprobs,
        )

    def ending(self, generation: Generation) -> bytes:
        return b"data: %b\n\n%b" % (self._ended(generation, [[] for _ in generation.choices]), DONE)

    def interruption(self, error: MillraceError) -> bytes:
        return b""

    def failure(self, generation: Generation) -> MillraceError | None:
        failure = generation.error()
        return None if failure is None else MillraceError(failure)

    def refusal(self, error: MillraceError) -> Response:
        return problem_response(error)

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        return self._ended(generation, [[p for p in pieces if p.choice == c.index] for c in generation.choices])

    def _ended(self, generation: Generation, pieces: list[list[Piece]]) -> bytes:
        usage = generation.usage()
        answer = self._same | {
            "choices": [self._choice(*pair) for pair in zip(generation.choices, pieces, strict=True)],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
                "cached_tokens": usage.cached_tokens,
            },
            "timings": generation.timings(),
        }
        error = generation.error()
        return orjson.dumps(answer if error is None else answer | {"error": problem(MillraceError(error))})

    def _choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, object]:
        finish = choice.finish
        return {
            "index": choice.index,
            "text": "".join(piece.text for piece in pieces) + choice.held_back,
            "token_ids": [piece.token_id for piece in pieces],
            "logprobs": logprobs_of(self._tokenizer, pieces) if self._with_logprobs else None,
            "finish_reason": finish.reason.value if finish else None,
            "stop_reason": finish.stop_reason if finish else None,
        }


def logprobs_of(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, list[object]]:
    """In the shape of OpenAI's completions. A number that JSON lacks (-inf) becomes null."""
    known = [(piece, piece.logprob) for piece in pieces if piece.logprob is not None]
    return {
        "tokens": [tokenizer.token_text(piece.token_id) for piece, _ in known],
        "token_logprobs": [logprob.logprob for _, logprob in known],
        "top_logprobs": [_top(tokenizer, piece.token_id, logprob) for piece, logprob in known],
        "text_offset": [piece.offset for piece, _ in known],
    }


def _top(tokenizer: Tokenizer, token_id: int, logprob: TokenLogprob) -> dict[str, float]:
    """The likeliest and the drawn one; of tokens that look the same, the likelier."""
    found: dict[str, float] = {}
    for top_id, value in (*logprob.top, (token_id, logprob.logprob)):
        found.setdefault(tokenizer.token_text(top_id), value)
    return found
