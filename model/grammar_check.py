"""Whether a client's grammar is taken: limits on size and depth, and a trial in a process that may be killed.

The library's own limits do not hold for everything: a `multipleOf` of seven digits, or twenty patterns that must hold
together, keep its compiler busy for hours. So the trial is a child process with a second of processor time and 256 MiB,
which ends itself by a timer. It keeps running for the next grammar; what it said is remembered. No torch, no HTTP.

The child: one JSON array `[kind, text]` a line in, one JSON string a line out, "" if the grammar is taken.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from model.grammar import GrammarError, Matcher, Vocabulary
from model.request import Grammar

MAX_REGEX_CHARS, MAX_GRAMMAR_CHARS, MAX_SCHEMA_CHARS = 1024, 8192, 32_768
MAX_DEPTH, MAX_NODES, MAX_ENUM, MAX_PATTERN_CHARS = 16, 512, 256, 256
MAX_REMEMBERED, MAX_WAITING = 256, 32
CPU_S, WALL_S, MEMORY_BYTES = 1.0, 3.0, 256 * 2**20
TOO_MUCH = f"one that compiles within {CPU_S:.0f} s and {MEMORY_BYTES >> 20} MiB"
EMBEDDED = re.compile(r"%json\s*")
CHANGES_MEANING = "x-guidance"  # options for the library, among them to overlook what it can't hold to


class TooManyTrials(Exception):
    """So many grammars wait to be tried that this one is not."""


def of_schema(schema: Mapping[str, object]) -> Grammar:
    """A JSON schema as a grammar, if it is within the limits. Raises `GrammarError`."""
    for num_nodes, (depth, node) in enumerate(_nodes(schema), 1):
        if depth > 2 * MAX_DEPTH:  # a schema within a schema is two levels of JSON, `properties` and its name
            raise GrammarError(f"a schema at most {MAX_DEPTH} schemas deep")
        if num_nodes > 2 * MAX_NODES:
            raise GrammarError(f"a schema of at most {MAX_NODES} schemas")
        if isinstance(node, dict):
            _check_keywords(node)
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError:
        raise GrammarError("a schema of finite numbers") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise GrammarError(f"a schema of at most {MAX_SCHEMA_CHARS} characters")
    return Grammar("json_schema", text)


def of_lark(text: str) -> Grammar:
    """A grammar in Lark's words, if the JSON schemas in it are within the limits. Raises `GrammarError`."""
    if "%llguidance" in text:
        raise GrammarError("a grammar without %llguidance: its options are the server's")
    for found in EMBEDDED.finditer(text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            raise GrammarError("a JSON schema behind each %json") from None
        if isinstance(schema, dict):
            of_schema(schema)
    return Grammar("lark", text)


class GrammarCheck:
    """Tries grammars, one at a time, on a thread of its own. The child is started with the first one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "grammar-check")
        self._said: OrderedDict[Grammar, str] = OrderedDict()
        self._child: subprocess.Popen[bytes] | None = None
        self._num_waiting = 0

    def submit(self, grammar: Grammar) -> "Future[str]":
        """What speaks against it, in one line; "" if it is taken. Raises `TooManyTrials`."""
        if self._num_waiting >= MAX_WAITING:
            raise TooManyTrials
        self._num_waiting += 1
        return self._pool.submit(self._try, grammar)

    def _try(self, grammar: Grammar) -> str:
        try:
            if grammar not in self._said:
                self._said[grammar] = self._ask(grammar)
            self._said.move_to_end(grammar)
            while len(self._said) > MAX_REMEMBERED:
                self._said.popitem(last=False)
            return self._said[grammar]
        finally:
            self._num_waiting -= 1

    def _ask(self, grammar: Grammar) -> str:
        child = self._child
        if child is None or child.poll() is not None:
            self._child = child = _start()
            weakref.finalize(self, _end, child)
        assert child.stdin is not None and child.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        if not answer.endswith(b"\n"):
            _end(child)
            return TOO_MUCH
        said: str = json.loads(answer)
        return said


def _start() -> "subprocess.Popen[bytes]":
    isolated = [] if str(Path.cwd()) in sys.path else ["-P"]  # it finds the modules that this process found
    return subprocess.Popen(
        [sys.executable, *isolated, "-m", "model.grammar_check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at a terminal is not for it; it ends with its input
    )


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.communicate()


def _nodes(schema: object) -> Iterator[tuple[int, object]]:
    """Every object and list in a schema, with its depth."""
    waiting = [(1, schema)]
    while waiting:
        depth, node = waiting.pop()
        yield depth, node
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(depth + 1, each) for each in inner if isinstance(each, dict | list)]


def _check_keywords(node: Mapping[str, object]) -> None:
    patterns = [node.get("pattern"), *_keys(node.get("patternProperties"))]
    if any(isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
        raise GrammarError(f"a schema with patterns of at most {MAX_PATTERN_CHARS} characters")
    values, reference = node.get("enum"), node.get("$ref")
    if isinstance(values, list) and len(values) > MAX_ENUM:
        raise GrammarError(f"a schema with at most {MAX_ENUM} values in an enum")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise GrammarError("a schema with references into itself only, beginning with #")
    if CHANGES_MEANING in node:
        raise GrammarError(f"a schema without {CHANGES_MEANING}")


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _verdict(grammar: Grammar, vocabulary: Vocabulary) -> str:
    try:
        matcher = Matcher.compiled(grammar, vocabulary)
    except GrammarError as error:
        return f"one that output can be held to; this one can't: {error}"
    matcher.allowed()
    dead_end = matcher.finish is not None and not matcher.accepts
    return "one that some text matches" if dead_end else ""


def main() -> None:
    """The child."""
    os.nice(5)  # who serves goes first
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    vocabulary = Vocabulary([bytes([byte]) for byte in range(256)])
    for line in sys.stdin.buffer:
        # Nothing handles these signals, so they end the process, also where no Python runs.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.setitimer(signal.ITIMER_REAL, WALL_S)
        said = _verdict(Grammar(*json.loads(line)), vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
