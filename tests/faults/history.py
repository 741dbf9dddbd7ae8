"""What should have come: the unfailed run of every request, by one engine in this process, and the comparison with it.

Exact means nothing missing, repeated, reordered or different, one terminal event, and the same bytes for every reader.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model.assemble import Assembler
from model.engine.engine import Engine
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer
from tests.faults.client import Reading

SAMPLING = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


def asked(prompt: str, seed: int, max_tokens: int, **fields: object) -> dict[str, Any]:
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


class Unfailed:
    """The oracle of the real engine in float32: each distinct request is computed once, alone."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine.load(folder, device="cpu", dtype="float32", max_num_seqs=1)
        self._known: dict[str, Expected] = {}

    def expect(self, body: Mapping[str, Any]) -> Expected:
        """The answer to a body made by `asked`."""
        key = json.dumps(body, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._run(body)
        return self._known[key]

    def _run(self, body: Mapping[str, Any]) -> Expected:
        request = to_request(self._engine.tokenizer, body)
        self._engine.add(request)
        token_ids: list[int] = []
        while self._engine.has_work():
            token_ids += (token_id for delta in self._engine.step() for token_id in delta.token_ids)
        return Expected(token_ids, text_of(self._engine.tokenizer, request, token_ids))


def to_request(tokenizer: Tokenizer, body: Mapping[str, Any]) -> Request:
    """What intake makes of a body made by `asked`, as far as it shows in the ids."""
    fields = {name: body[name] for name in (*SAMPLING, "seed", "max_tokens") if name != "ignore_eos"}
    prompt = body["prompt"]
    ids = tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt
    return Request("unfailed", tuple(ids), SamplingParams(**fields))


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
    expected = oracle.expect({name: reading.body[name] for name in ("prompt", "seed", "max_tokens", *SAMPLING)})
    got, text = reading.token_ids[0], reading.text[0] + reading.terminal["choices"][0]["text"]
    if reason == "length":
        same = got == expected.token_ids and text == expected.text
    else:
        same = got == expected.token_ids[: len(got)] and expected.text.startswith(text.rstrip("�"))
    if not same:
        at = next((i for i, (a, b) in enumerate(zip(got, expected.token_ids, strict=False)) if a != b), len(got))
        found.append(f"differs at token {at} of {len(got)}, expected {len(expected.token_ids)}")
    if reading.terminal["usage"]["completion_tokens"] != len(got):
        found.append(f"usage {reading.terminal['usage']} after {len(got)} tokens")
    return found


def assert_exact(readings: list[Reading], oracle: Oracle) -> None:
    """Every reading came whole, as if nothing had happened."""
    wrong = {i: told for i, reading in enumerate(readings) if (told := complaints(reading, oracle))}
    assert not wrong, f"{len(wrong)} of {len(readings)} streams are wrong: {dict(list(wrong.items())[:5])}"
