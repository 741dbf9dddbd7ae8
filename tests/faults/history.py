"""What should have come: the unfailed run of every request, by one engine in this process, and the comparison with it.

Exact means nothing missing, repeated, reordered or different, one terminal event, and the same bytes for every reader.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from model.assemble import Assembler
from model.engine.engine import Engine
from model.request import Request, SamplingParams, begun
from model.tokenizer import Tokenizer
from tests.faults.client import Reading

DIFFERS = re.compile(rb'"created":\d+|"timings":\{[^}]*\}|,"cached_tokens":\d+')
SAMPLING = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


def asked(prompt: str | list[int], seed: int, max_tokens: int, **fields: object) -> dict[str, Any]:
    """A body in which every setting is named, so that the model's own defaults play no part."""
    return {"prompt": prompt, "seed": seed, "max_tokens": max_tokens, **SAMPLING, **fields}


@dataclass(frozen=True, slots=True)
class Expected:
    """One unfailed answer."""

    token_ids: list[int]
    text: str


class Oracle(Protocol):
    """Where expected answers come from."""

    def expect(self, body: Mapping[str, Any]) -> Expected: ...
    def prepare(self, bodies: Iterable[Mapping[str, Any]]) -> None: ...


class Unfailed:
    """The oracle of the real engine in float32. Each pair of prompt and seed is computed once, as far as `num_tokens`,
    and once more if more is asked for; an answer is the beginning of that, since nothing but the length ends these."""

    def __init__(self, folder: Path, num_tokens: int = 0) -> None:
        self._engine = Engine.load(folder, device="cpu", dtype="float32", max_num_seqs=16, native=False)
        self._num_tokens = num_tokens
        self._known: dict[str, list[int]] = {}

    def expect(self, body: Mapping[str, Any]) -> Expected:
        """The answer to a body made by `asked`."""
        self.prepare([body])
        request = to_request(self._engine, body)
        token_ids = self._known[_kind(body)][: body["max_tokens"]]
        return Expected(token_ids, text_of(self._engine.tokenizer, request, token_ids))

    def prepare(self, bodies: Iterable[Mapping[str, Any]]) -> None:
        """Compute what is not known yet, in one batch: each of its rows is what it would be alone."""
        lacking: dict[str, Mapping[str, Any]] = {}
        for body in sorted(bodies, key=lambda body: int(body["max_tokens"])):
            if body["max_tokens"] > len(self._known.get(kind := _kind(body), ())):
                lacking[kind] = body
        for kind, body in lacking.items():
            self._known[kind] = []
            num = max(self._num_tokens, body["max_tokens"])
            self._engine.add(replace(to_request(self._engine, {**body, "max_tokens": num}), id=kind))
        while self._engine.has_work():
            for delta in self._engine.step():
                self._known[delta.id] += delta.token_ids


def _kind(body: Mapping[str, Any]) -> str:
    return json.dumps({name: body[name] for name in ("prompt", "seed", *SAMPLING)})


def to_request(engine: Engine, body: Mapping[str, Any]) -> Request:
    """What intake makes of a body made by `asked`, as far as it shows in the ids."""
    fields = {name: body[name] for name in (*SAMPLING, "seed", "max_tokens") if name != "ignore_eos"}
    prompt = body["prompt"]
    ids = engine.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt
    prompt_ids, source_ids = begun(tuple(ids), engine.start_id)
    return Request("unfailed", prompt_ids, SamplingParams(**fields), source_ids=source_ids)


def text_of(tokenizer: Tokenizer, request: Request, token_ids: list[int]) -> str:
    """The whole text of these ids."""
    assembler = Assembler(tokenizer, request)
    return "".join(map(assembler.push, token_ids)) + assembler.finish()


def complaints(reading: Reading, oracle: Oracle, reason: str = "length") -> list[str]:
    """In what a reading of a single choice differs from the unfailed run; empty if it is exact."""
    found = list(reading.violations)
    if reading.terminal is None:
        ends = [f"{part.port}: {part.status} {part.broken or part.body[:120]!r}" for part in reading.parts[-3:]]
        return [*found, f"no terminal event after {reading.num_tokens} tokens; {ends}"]
    told = reading.terminal["choices"][0]["finish_reason"]
    if told != reason:
        found.append(f"finish_reason {told} instead of {reason}; {reading.terminal.get('error')}")
    expected = oracle.expect(reading.body)
    got, text = reading.token_ids[0], reading.text[0] + reading.terminal["choices"][0]["text"]
    if reason == "length":
        same = got == expected.token_ids and text == expected.text
    else:
        same = got == expected.token_ids[: len(got)] and expected.text.startswith(text.rstrip("�"))
    if not same:
        at = next((i for i, (a, b) in enumerate(zip(got, expected.token_ids, strict=False)) if a != b), len(got))
        found.append(f"differs at token {at} of {len(got)}, expected {len(expected.token_ids)}")
    if reading.terminal["usage"]["completion_tokens"] != reading.num_tokens:
        found.append(f"usage {reading.terminal['usage']} after {reading.num_tokens} tokens")
    return found


def frames(reading: Reading) -> list[tuple[str, bytes]]:
    """The bytes of every event and its id, without what differs between two runs: whose they are, the times, and
    how much was found in the cache."""
    return [
        (id.partition(":")[2], DIFFERS.sub(b"", data.replace(reading.id.encode(), b""))) for id, data in reading.data()
    ]


def assert_exact(readings: list[Reading], oracle: Oracle) -> None:
    """Every reading came whole, as if nothing had happened."""
    oracle.prepare([reading.body for reading in readings])
    wrong = {i: told for i, reading in enumerate(readings) if (told := complaints(reading, oracle))}
    assert not wrong, f"{len(wrong)} of {len(readings)} streams are wrong: {dict(list(wrong.items())[:5])}"
