"""The answers of `/v1/embeddings` and `/classify`: bytes of results in, JSON out. They come in one piece only.

It knows JSON and field names; a result is float32 numbers, little-endian, as `model/request.py` has it.
"""

import base64
import sys
from array import array
from collections.abc import Sequence

import orjson
from starlette.responses import Response

from model.request import FinishReason
from service.errors import MillraceError
from service.http.generation import Generation, Piece
from service.http.intake import Intake, Served
from service.http.openai_errors import openai_response
from service.http.openai_reply import failure_of
from service.http.problems import problem_response


class InOnePiece:
    """What a dialect without streams has in common: there are no events, and one text that failed fails them all."""

    location = ""

    def __init__(self, intake: Intake, served: Served) -> None:
        self._intake, self._served = intake, served

    def opening(self) -> bytes:
        """No events."""
        return b""

    def delta(self, piece: Piece) -> bytes:
        """No events: nothing is drawn."""
        return b""

    def ending(self, generation: Generation) -> bytes:
        """No events."""
        return b""

    def interruption(self, error: MillraceError) -> bytes:
        """No events."""
        return b""

    def failure(self, generation: Generation) -> MillraceError | None:
        """Of any of the texts."""
        for choice in generation.choices:
            failure = failure_of(choice.finish)
            if failure is not None:
                return failure
            if not choice.result or (choice.finish and choice.finish.reason is not FinishReason.STOP):
                return MillraceError("a text has ended without a result")
        return None

    def refusal(self, error: MillraceError) -> Response:
        """A problem object."""
        return problem_response(error)


class Embeddings(InOnePiece):
    """In OpenAI's words."""

    def refusal(self, error: MillraceError) -> Response:
        """In OpenAI's words."""
        return openai_response(error)

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """A vector for each text, in order."""
        as_text = self._intake.group[0].about == "base64"
        data = [
            {
                "object": "embedding",
                "index": choice.index,
                "embedding": base64.b64encode(choice.result).decode() if as_text else _numbers(choice.result),
            }
            for choice in generation.choices
        ]
        answer = {"object": "list", "data": data, "model": self._intake.model, "usage": _usage(generation)}
        return orjson.dumps(answer)


class Classes(InOnePiece):
    """The likeliest label of each text, and the probabilities of all."""

    def whole(self, generation: Generation, pieces: Sequence[Piece]) -> bytes:
        """In the order of the texts, and of the labels as the model has them."""
        data = []
        for choice in generation.choices:
            chances = dict(zip(self._served.labels, _numbers(choice.result), strict=True))
            label = max(chances, key=chances.__getitem__)
            data.append({"index": choice.index, "label": label, "probabilities": chances})
        same = {"id": self._intake.id, "model": self._intake.model, "created": self._intake.created}
        return orjson.dumps(same | {"data": data, "usage": _usage(generation)})


def _numbers(result: bytes) -> list[float]:
    numbers = array("f", result)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _usage(generation: Generation) -> dict[str, int]:
    usage = generation.usage()
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
