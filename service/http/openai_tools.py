"""Tool calls in text: finding those that a model writes in its template's format.

Three ways to write a call are known. Qwen and Hermes: `<tool_call>{"name", "arguments"}</tool_call>`. Mistral:
`[TOOL_CALLS][{"name", "arguments"}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`. Llama: an answer that begins with
`{"name", "parameters"}`, perhaps behind `<|python_tag|>`. What only looks like a call stays text. It knows no route and
no shape of an answer.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

import orjson

HERMES, HERMES_END, MISTRAL, LLAMA = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
OPENINGS = (HERMES, MISTRAL, LLAMA)
STARTS = frozenset(opening[0] for opening in OPENINGS)
CONTROL = frozenset((*OPENINGS, HERMES_END, "[CALL_ID]", "[ARGS]"))  # as control tokens they have no text of their own
BARE = ('{"name":"', '{"type":"function","name":"', '{"type":"function","function":{"name":"')  # without spaces
NUM_BARE = max(map(len, BARE))
NAMED = re.compile(r"\s*([a-zA-Z0-9_.-]{1,64})\s*(?:\[CALL_ID\]\w{1,64})?\[ARGS\]\s*")
MAX_NAMED = 192  # characters in which that must have come
BETWEEN = " \t\r\n;"  # what may stand between calls


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments` is JSON."""

    name: str
    arguments: str


class CallFinder:
    """Takes an answer's text as it comes and gives it back as text and calls, in order.

    Text that may become a call is held back, a call until it is whole. What a call may be without a marker before it is
    only believed for the names of `tools`.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self._tools = frozenset(tools)
        self._held = ""
        self._opening: str | None = None  # of the call that the held text goes on from; "" = it has none
        self._scan = _Scan()
        self._said = self._called = False  # text that is more than space; a call
        self._speaking = False  # that text came last, and no call
        self._closing = False  # the end of a call may come next

    def push(self, text: str) -> list[str | Call]:
        """What is certain now."""
        if self._speaking and not self._held and self._opening is None and STARTS.isdisjoint(text):
            return [text] if text else []  # the usual case, at a fraction of the cost
        self._held += text
        found: list[str | Call] = []
        while self._held and (self._in_call(found) if self._opening is not None else self._in_text(found)):
            pass
        return found

    def finish(self) -> list[str | Call]:
        """The rest, as what it is: text."""
        found: list[str | Call] = []
        rest, self._held = (self._opening or "") + self._held, ""
        self._opening = None
        if (rest.strip() and not self._closing) or self._speaking or not self._called:
            self._say(rest, found)
        return found

    def _in_text(self, found: list[str | Call]) -> bool:
        """One step; False if it needs more text."""
        space = BETWEEN if self._called and not self._said else None
        if self._closing:
            rest = self._held.lstrip()
            if HERMES_END.startswith(rest) and rest != HERMES_END:
                return False
            self._held, self._closing = rest.removeprefix(HERMES_END), False
        if not self._speaking and not self._held.strip(space):
            return False  # space may go before a call or after one, and then means nothing
        if not self._said and self._held.lstrip(BETWEEN).startswith("{"):
            self._open("", self._held)
            return True
        starts = [(at, opening) for opening in OPENINGS if (at := self._held.find(opening)) >= 0]
        if starts:
            at, opening = min(starts)
            if self._speaking or self._held[:at].strip():
                self._say(self._held[:at], found)
            self._open(opening, self._held[at + len(opening) :])
            return True
        cut = len(self._held) - _num_begun(self._held)
        if self._speaking or self._held[:cut].strip():
            self._say(self._held[:cut], found)
            self._held = self._held[cut:]
        return False

    def _in_call(self, found: list[str | Call]) -> bool:
        """One step; False if it needs more text."""
        assert self._opening is not None
        start, name = len(self._held) - len(self._held.lstrip(BETWEEN)), ""
        if self._opening == MISTRAL and self._held[start : start + 1] not in ("[", "{", ""):
            named = NAMED.match(self._held)
            if named is None:
                return len(self._held) > MAX_NAMED and self._give_up(found)
            start, name = named.end(), named[1]
        if start == len(self._held):
            return False
        if self._held[start] not in "{[":
            return self._give_up(found)
        if not self._opening and not _may_be_bare(self._held[start:]):
            return self._give_up(found)
        end = self._scan.end(self._held, start)
        if end is None:
            return False
        calls = self._calls(self._held[start:end], name)
        if calls is None:
            return self._give_up(found)
        found += calls
        self._closing, self._opening = self._opening == HERMES, None
        self._called, self._speaking = True, False
        self._held = self._held[end:]
        return True

    def _calls(self, text: str, name: str) -> list[Call] | None:
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if name:
            return [Call(name, _dumped(told))]
        calls = [_call(each) for each in (told if isinstance(told, list) else [told])]
        good = [call for call in calls if call is not None]
        if not good or len(good) < len(calls):
            return None
        if not self._opening and any(call.name not in self._tools for call in good):
            return None
        return good

    def _open(self, opening: str, rest: str) -> None:
        self._opening, self._held, self._scan = opening, rest, _Scan()

    def _give_up(self, found: list[str | Call]) -> bool:
        """It was none."""
        self._say(self._opening or "", found)
        self._opening, self._said, self._speaking = None, True, True
        return True

    def _say(self, text: str, found: list[str | Call]) -> None:
        if text:
            self._said = self._speaking = True
            found.append(text)


class _Scan:
    """Finds the end of a JSON object or list in text that grows; every character is looked at once."""

    def __init__(self) -> None:
        self._at, self._depth, self._in_string, self._escaped = -1, 0, False, False

    def end(self, text: str, start: int) -> int | None:
        """Behind its last bracket; None if that has not come."""
        for at in range(max(self._at, start), len(text)):
            letter = text[at]
            if self._escaped:
                self._escaped = False
            elif letter == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self._escaped = letter == "\\"
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._at = at + 1
                    return at + 1
        self._at = len(text)
        return None


def _call(told: object) -> Call | None:
    """Of any family's words for it."""
    if isinstance(told, dict) and isinstance(told.get("function"), dict):
        told = told["function"]
    if not isinstance(told, dict) or not isinstance(told.get("name"), str) or not told["name"]:
        return None
    arguments = told.get("arguments", told.get("parameters", {}))
    return Call(told["name"], arguments if isinstance(arguments, str) else _dumped(arguments))


def _dumped(value: object) -> str:
    """As text, with the numbers that only Python's writer takes."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def _may_be_bare(text: str) -> bool:
    begun = "".join(text[: 4 * NUM_BARE].split())[:NUM_BARE]
    return any(form.startswith(begun) or begun.startswith(form) for form in BARE)


def _num_begun(text: str) -> int:
    """The length of the longest end of `text` that begins a marker."""
    longest = max(map(len, OPENINGS)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(o.startswith(text[-n:]) for o in OPENINGS)), 0)
