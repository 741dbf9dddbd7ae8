"""Structured output: which ids a grammar allows next. The one place that knows llguidance.

It knows spellings, ids and bits; no request's life, no tensor, no HTTP. Whether a client's grammar is taken at all is
found out in a process of its own, `grammar_check.py`, since compiling one may take for ever or all memory; here only
what was taken is compiled. Text is allowed byte by byte, however tokens cut it, so the bits are a function of the
grammar and of the text so far: not of the batch, nor of who computed the ids before.

A grammar ends an output in two ways. Where what there is already matches, ids that stop the sequence are allowed beside
those that go on. Where nothing can follow, the output is complete, and no such id is needed.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import llguidance

from model.request import Finish, FinishReason, Grammar

MAX_KEPT = 256  # compiled grammars
# Between two elements of JSON, a space or an indented line. More is valid too, and a small model's way never to end.
BLANK = {"x-guidance": {"whitespace_pattern": r" |\n( {0,16}|\t{0,8})"}}
# Tokens are not to be the ones that the tokenizer would have made of a text that has no alternative.
HEAD = '%llguidance {"no_forcing": true}\n'
PLACE = re.compile(r"^(at \d+\(\d+\): |failed to compile JSON schema: )*")
MAX_ERROR_CHARS = 200
STOP = Finish(FinishReason.STOP)


class GrammarError(ValueError):
    """A grammar that can't be taken or followed: why, in one line."""


def limits() -> llguidance.LLParserLimits:
    """Of one step about 10 ms and of the states that one output visits about 10 MB, so that a grammar made for it can
    slow others down, but not stop them."""
    return llguidance.LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=100_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class Vocabulary:
    """The spelling of ids: `pieces` are the bytes of ids 0 .. n - 1. Ids in `control` have no text and are never
    allowed as such."""

    def __init__(self, pieces: Sequence[bytes], control: Collection[int] = ()) -> None:
        self.num_ids, self.control = len(pieces), frozenset(control)
        self.library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelling(pieces, sorted(self.control))))


class _Spelling:
    """What the library asks of a tokenizer. Without an end-of-sequence id it makes one up, the first after all others:
    its bit says that the output may end here."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, pieces: Sequence[bytes], control: Sequence[int]) -> None:
        self.tokens, self.special_token_ids = list(pieces), [i for i in control if i < len(pieces)]

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("text is never forced, so it need not be tokenised")


class Matcher:
    """One output against one grammar: `push` its ids as they come; `allowed` are those that may be next."""

    def __init__(self, inner: llguidance.LLMatcher, vocabulary: Vocabulary, ends: Iterable[int], num_ids: int) -> None:
        self._inner, self._vocabulary, self._ends = inner, vocabulary, tuple(ends)
        self._num_bytes = -(-num_ids // 8)
        self._allowed: bytes | None = None
        self._goes_on = True  # some text does, as far as is known

    @classmethod
    def compiled(cls, grammar: Grammar, vocabulary: Vocabulary) -> "Matcher":
        """For an output that is empty yet. Raises `GrammarError`."""
        text = source(grammar)
        # Without a vocabulary it complains of names of control tokens, and what it warns of it would not hold to.
        _, complaints = llguidance.LLMatcher.validate_grammar_with_warnings(text, limits=limits())
        inner = None if complaints else llguidance.LLMatcher(vocabulary.library, text, log_level=0, limits=limits())
        if inner is None or inner.is_error():
            raise GrammarError(_one_line(inner.get_error() if inner else complaints[0]))
        return cls(inner, vocabulary, (), vocabulary.num_ids)

    def fork(self, ends: Iterable[int], num_ids: int) -> "Matcher":
        """Another one that goes on from here by itself; `ends` are the ids that stop its sequence, `num_ids` is the
        network's number of ids."""
        return Matcher(self._inner.deep_copy(), self._vocabulary, ends, num_ids)

    def push(self, token_id: int) -> None:
        """One more id of the output. One without text changes nothing."""
        if token_id not in self._vocabulary.control:
            self._inner.consume_token(token_id)
            self._allowed = None

    def allowed(self) -> bytes:
        """One bit for each id, the lowest first. None is set if the output is complete, or can't be followed further:
        `finish` says which."""
        if self._allowed is None:
            self._allowed = self._bits()
        return self._allowed

    @property
    def accepts(self) -> bool:
        """What there is so far matches as a whole."""
        return bool(self._inner.is_accepting())

    @property
    def finish(self) -> Finish | None:
        """How the grammar ends the sequence; None: it goes on."""
        accepts = self.accepts
        if accepts:
            self.allowed()  # tells whether anything can follow
        if self._goes_on and not self._inner.is_stopped():
            return None
        if accepts:
            return STOP
        return Finish(FinishReason.ERROR, error=f"the grammar can't be followed further: {self._why()}")

    def _why(self) -> str:
        return _one_line(self._inner.get_error()) or "no text of this vocabulary goes on"

    def _bits(self) -> bytes:
        bits = bytearray(self._num_bytes)
        if self._inner.is_stopped():
            return bytes(bits)
        found = self._inner.compute_bitmask()
        may_end, last = self._vocabulary.num_ids, min(len(found), self._num_bytes)
        bits[:last] = found[:last]
        accepts = found[may_end // 8] >> may_end % 8 & 1
        for bit in range(may_end, min(last * 8, may_end + 32)):  # its own, and what fills the last word
            bits[bit // 8] &= ~(1 << bit % 8)
        self._goes_on = any(bits)
        if accepts and self._goes_on:
            for end in self._ends:
                bits[end // 8] |= 1 << end % 8
        return bytes(bits)


class Grammars:
    """Makes matchers, on a thread of its own: whoever computes need not wait. The latest compiled grammars are kept.

    `spell` gives the bytes of ids below `num_spelled`; a network that has more ids (`num_ids`) is never let to draw
    those."""

    def __init__(self, spell: Callable[[int], bytes], num_spelled: int, control: Collection[int], num_ids: int) -> None:
        self._spell, self._num_spelled = spell, min(num_spelled, num_ids)
        self._control, self._num_ids = control, num_ids
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "grammar")
        self._making: dict[str, Future[Matcher]] = {}

    def begin(self, id: str, grammar: Grammar, ends: Iterable[int], so_far: Sequence[int]) -> None:
        """Make the matcher of sequence `id`, whose output has some ids already."""
        self._making[id] = self._pool.submit(self._make, grammar, tuple(ends), tuple(so_far))

    def forget(self, id: str) -> None:
        """The sequence is not wanted any more."""
        self._making.pop(id).cancel()

    def take(self, wait_s: float) -> list[tuple[str, Matcher | Finish]]:
        """Those that have been made since; waits so long for the first. In place of one that failed, the end of its
        sequence."""
        wait(self._making.values(), wait_s, FIRST_COMPLETED)
        done = [id for id, making in self._making.items() if making.done()]
        return [(id, _outcome(self._making.pop(id))) for id in done]

    def _make(self, grammar: Grammar, ends: tuple[int, ...], so_far: tuple[int, ...]) -> Matcher:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary([self._spell(i) for i in range(self._num_spelled)], self._control)
        if grammar not in self._kept:
            self._kept[grammar] = Matcher.compiled(grammar, self._vocabulary)
        self._kept.move_to_end(grammar)
        matcher = self._kept[grammar].fork(ends, self._num_ids)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        for token_id in so_far:
            matcher.push(token_id)
        matcher.allowed()  # here, where nobody waits: the first mask of a grammar is the slowest
        return matcher


def source(grammar: Grammar) -> str:
    """The grammar as the library reads it."""
    match grammar.kind:
        case "json_object":
            text = "start: %json " + json.dumps({"type": "object", **BLANK})
        case "json_schema":
            schema: dict[str, Any] = json.loads(grammar.text)
            text = "start: %json " + json.dumps({**schema, **BLANK})
        case "regex":
            text = f"start: /{llguidance.regex_to_lark(grammar.text)}/"
        case "lark":
            text = grammar.text
    return llguidance.LLMatcher.grammar_from_lark(HEAD + text)


def _outcome(made: Future[Matcher]) -> Matcher | Finish:
    try:
        matcher = made.result()
    except ValueError as error:
        return Finish(FinishReason.ERROR, error=f"the grammar can't be followed: {error}")
    return matcher.finish or matcher


def _one_line(error: str) -> str:
    """The line that says most: what a parser of regular expressions complains of stands below the expression."""
    lines = error.strip().splitlines() or [""]
    first = next((line for line in lines if line.startswith("error: ")), lines[0])
    return PLACE.sub("", first)[:MAX_ERROR_CHARS]
