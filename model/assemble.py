"""Output ids to the text a client sees: detokenised, cut at stop strings, nothing shown that might be cut later.

A pure function of the prompt ids, the output ids and the request's options, so that a resumed stream gives the bytes of
the unbroken one. The HTTP half makes text with it, the engine finds stop strings with it. It knows no log and no queue.
"""

from collections.abc import Iterable

from model.request import Request
from model.tokenizer import Tokenizer


class Assembler:
    """The text of one request, token by token.

    `opening` is the prompt's text if it is echoed, else "". `stopped` is the stop string that was hit, else None; the
    text ends before it. Stop strings are looked for in the output only, never in the prompt. The one that is complete
    first wins, the longest if several are complete with the same character, so it doesn't matter how tokens cut the
    text. One counts if it is completed by output token number `min_tokens` or a later one.
    """

    __slots__ = (
        "_beginnings",
        "_detokenizer",
        "_ended",
        "_held",
        "_min_tokens",
        "_num_tokens",
        "_stop_ids",
        "_stops",
        "opening",
        "stopped",
    )

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._min_tokens = request.sampling.min_tokens
        self._stop_ids = frozenset(request.sampling.stop_token_ids)
        self._stops = tuple(stop for stop in request.text.stop if stop)
        self._beginnings = frozenset(stop[0] for stop in self._stops)
        self._num_tokens = 0
        self._ended = False
        self._held = ""  # the longest end of the text so far that a stop string begins with
        self.stopped: str | None = None
        # An answer is a text of its own, so only a prompt that is gone on with leaves its end to it.
        goes_on = not request.text.echo and not request.source_ids
        self._detokenizer = tokenizer.detokenizer(request.prompt_ids if goes_on else ())
        self.opening = self._echoed(tokenizer, request) if request.text.echo else ""

    def _echoed(self, tokenizer: Tokenizer, request: Request) -> str:
        if request.source_ids:
            return tokenizer.decode(request.source_ids)
        return "".join(map(self._detokenizer.push, request.prompt_ids))

    def push(self, token_id: int) -> str:
        """The text that can be shown with one more output id. Nothing more comes after a stop string or a stop id;
        a stop id has no text, whatever the tokenizer says."""
        if self._ended:
            return ""
        self._num_tokens += 1
        if token_id in self._stop_ids and self._num_tokens > self._min_tokens:
            self._ended = True
            return ""
        text = self._detokenizer.push(token_id)
        return self._release(text) if self._stops and text else text

    def finish(self) -> str:
        """What was held back, once no more ids come: the beginning of a stop string, an unfinished character."""
        if self.stopped is not None:
            return ""
        self._ended = True
        text = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        """Take new text in and give out what no stop string can claim any more."""
        text = self._held + new
        if self._beginnings.isdisjoint(text):  # the usual case, at a tenth of the cost; nothing was held either
            return text
        if self._num_tokens >= self._min_tokens:
            hit = _first_hit(text, len(self._held), self._stops)
            if hit is not None:
                start, self.stopped = hit
                self._ended, self._held = True, ""
                return text[:start]
        cut = len(text) - _num_claimed(text, self._stops)
        self._held = text[cut:]
        return text[:cut]


def assemble(
    tokenizer: Tokenizer, request: Request, token_ids: Iterable[int], *, finished: bool = True
) -> tuple[str, str | None]:
    """The whole text, opening included, and the stop string that was hit. `finished`: no more ids will come."""
    assembler = Assembler(tokenizer, request)
    text = assembler.opening + "".join(map(assembler.push, token_ids))
    return text + (assembler.finish() if finished else ""), assembler.stopped


def _first_hit(text: str, num_old: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, if it is not yet complete in the first `num_old` chars."""
    hits = []
    for stop in stops:
        start = text.find(stop, max(0, num_old - len(stop) + 1))
        if start >= 0:
            hits.append((start + len(stop), start, stop))
    return min(hits)[1:] if hits else None


def _num_claimed(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that is the beginning, and not all, of a stop string."""
    longest = 0
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0:
            if stop.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start = text.find(stop[0], start + 1)
    return longest
