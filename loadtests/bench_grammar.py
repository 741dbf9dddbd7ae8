"""What a grammar costs: tokens/s of the bare engine with and without one, and the time that its parts take.

    python -m loadtests.bench_grammar

Free and held requests are measured in turn, in one run on one machine, and medians are printed: on a shared machine
only the ratio means much. Both go on for the same number of tokens; the grammars are such that none ends before. Then
the outputs are gone through once more, to time each mask and each token by itself.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from loadtests.bench import BUNDLED, PROMPT
from model.engine.engine import Engine
from model.grammar import Matcher, Vocabulary
from model.grammar_check import GrammarCheck, of_schema
from model.request import Grammar, Request, SamplingParams
from service.work import spare_cores

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "trade": {"enum": ["miller", "baker", "smith"]},
        "friends": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "trade", "friends"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, Grammar] = {
    "schema": of_schema({"type": "array", "items": PERSON, "minItems": 1000}),
    "object": of_schema({"type": "object", "minProperties": 1000}),
    "regex": Grammar("regex", r"([A-Z][a-z ]{5,60}\.\n){1000}"),
}


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """Milliseconds to try it at the door and to compile it; microseconds of each mask and of each token taken in."""

    door_ms: float
    compile_ms: float
    masks_us: list[float]
    pushes_us: list[float]


def run(engine: Engine, grammar: Grammar | None, num_streams: int, num_tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens/s, and the outputs."""
    prompt_ids = tuple(engine.tokenizer.encode(PROMPT))
    outputs: dict[str, list[int]] = {f"s{i}": [] for i in range(num_streams)}
    began_s = time.perf_counter()
    for i, name in enumerate(outputs):
        engine.add(Request(name, prompt_ids, SamplingParams(seed=i, max_tokens=num_tokens), grammar=grammar))
    while engine.has_work():
        for delta in engine.step():
            outputs[delta.id] += delta.token_ids
    took_s = time.perf_counter() - began_s
    assert all(len(ids) == num_tokens for ids in outputs.values())
    return num_streams * num_tokens / took_s, list(outputs.values())


def parts(engine: Engine, grammar: Grammar, outputs: list[list[int]], check: GrammarCheck) -> Parts:
    """The same work outside of the engine, piece by piece."""
    tokenizer = engine.tokenizer
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    vocabulary = Vocabulary(pieces, tokenizer.control_ids)
    door_ms, refusal = _timed_ms(lambda: check.submit(grammar).result())
    assert refusal == "", refusal
    compile_ms, compiled = _timed_ms(lambda: Matcher.compiled(grammar, vocabulary))
    found = Parts(door_ms, compile_ms, [], [])
    for ids in outputs:
        matcher = compiled.fork((), len(pieces))
        for token_id in ids:
            found.masks_us.append(_timed_ms(matcher.allowed)[0] * 1e3)
            found.pushes_us.append(_timed_ms(lambda: matcher.push(token_id))[0] * 1e3)  # noqa: B023
    return found


def _timed_ms(do: Callable[[], T]) -> tuple[float, T]:
    began_s = time.perf_counter()
    result = do()
    return (time.perf_counter() - began_s) * 1e3, result


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description="Tokens/s with and without a grammar, measured in turn.")
    parser.add_argument("--tokens", type=int, default=96, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()
    torch.set_num_threads(spare_cores())
    engine, check = Engine.load(BUNDLED), GrammarCheck()
    check.submit(Grammar("json_object")).result()  # starts its child
    print("grammar   streams   free tok/s   held tok/s   ratio")
    outputs: dict[str, list[list[int]]] = {}
    for name, grammar in GRAMMARS.items():
        for num_streams in args.streams:
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.rounds + 1):
                for held in (False, True):
                    rate, told = run(engine, grammar if held else None, num_streams, args.tokens)
                    rates[held].append(rate)
                    if held:
                        outputs[name] = told
            pairs = list(zip(rates[False], rates[True], strict=True))[1:]  # the first warms up
            free, held_rate = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            ratio = statistics.median(held / free for free, held in pairs)
            print(f"{name:9} {num_streams:7} {free:12.0f} {held_rate:12.0f} {ratio:7.2f}", flush=True)
    print("\ngrammar   door ms   compile ms   mask µs: median   p99     max   token µs: median")
    for name, grammar in GRAMMARS.items():
        found = parts(engine, grammar, outputs[name], check)
        masks = [_quantile(found.masks_us, q) for q in (0.5, 0.99, 1)]
        print(
            f"{name:9} {found.door_ms:7.1f} {found.compile_ms:12.1f} {masks[0]:17.0f} {masks[1]:5.0f} {masks[2]:7.0f}"
            f" {statistics.median(found.pushes_us):18.1f}"
        )


if __name__ == "__main__":
    main()
