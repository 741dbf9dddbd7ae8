"""`make bench-same-text`: how many requests get the same output alone and among random others.

    python -m loadtests.same_text --model path/to/folder --formats float32 bfloat16 --device cpu

Every request runs alone in an engine of its own, and then among others: in batches of a random size, with prompts cut
into chunks of a random size, in a random order. Outputs are compared id by id. For every number format, without and
with `--deterministic`, it prints the share of equal outputs, the first difference, and what `--deterministic` costs:
the ratio of the times of the same requests in turn, the median of `--rounds`.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.engine.engine import Engine
from model.request import Request, SamplingParams
from service.work import spare_cores

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
FORMATS = ("float32", "bfloat16", "float32-int8", "bfloat16-int8")
STEPS = ((2, 32), (5, 512), (17, 100), (64, 64), (64, 512))  # most sequences, and tokens, of one step
SPEED_STREAMS = (1, 8, 32)
Outputs = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an output among others first differs from the one alone."""

    request: str
    position: int
    alone: int | None
    among: int | None

    def __str__(self) -> str:
        return f"{self.request} at output {self.position}: {self.alone} alone, {self.among} among others"


class Bench:
    """One network and everything that is asked of it."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        dtype, _, quantize = name.partition("-")
        self._engine = Engine.load(
            args.model,
            device=args.device,
            dtype=dtype,
            quantize=quantize or "none",
            cache_gib=args.cache_gib,
            native=False,  # which would take the weights for itself
        )
        self._native = args.native
        self._rounds, self._draw = args.rounds, random.Random(args.seed)
        self.requests = self._make(args.requests, args.tokens)

    @property
    def has_choice(self) -> bool:
        """Whether `deterministic` changes anything."""
        return self._engine.config.device != "cpu" or self._engine.config.dtype != "float32"

    def engine(self, deterministic: bool, num_seqs: int, num_tokens: int) -> Engine:
        """Another engine over the same weights."""
        config = replace(
            self._engine.config,
            native=self._native,
            deterministic=deterministic,
            max_num_seqs=num_seqs,
            max_batch_tokens=num_tokens,
        )
        return Engine(self._engine.runner.decoder, self._engine.tokenizer, config)

    def compare(self, deterministic: bool) -> list[Difference]:
        """The first difference of every request that has one."""
        alone: Outputs = {}
        single = self.engine(deterministic, 1, 512)
        for request in self.requests:
            alone |= run(single, [request])
        engines = [self.engine(deterministic, *step) for step in STEPS]
        among: Outputs = {}
        order = self._draw.sample(self.requests, len(self.requests))
        while order:
            engine = self._draw.choice(engines)
            num = self._draw.randint(2, 2 * engine.config.max_num_seqs)
            among |= run(engine, order[:num])
            order = order[num:]
        return list(differences(alone, among))

    def cost(self, num_streams: int) -> float:
        """How many times as long the same requests take with `deterministic`: the median of pairs, in turn."""
        engines = [self.engine(fixed, num_streams, 512) for fixed in (False, True)]
        prompt_ids = self._prompt(128)
        params = SamplingParams(temperature=0.0, max_tokens=64)
        load = [Request(f"s{i}", prompt_ids[i % 7 :], params) for i in range(num_streams)]
        pairs = []
        for _ in range(self._rounds + 1):
            times = []
            for engine in engines:
                began_s = time.perf_counter()
                run(engine, load)
                times.append(time.perf_counter() - began_s)
            pairs.append(times[1] / times[0])
        return statistics.median(pairs[1:])  # the first warms up

    def _make(self, num: int, num_tokens: int) -> list[Request]:
        return [
            Request(
                f"r{i}",
                self._prompt(self._draw.randint(1, 200)),
                SamplingParams(
                    temperature=self._draw.choice((0.0, 0.7, 1.0)),
                    top_p=self._draw.choice((1.0, 0.9)),
                    seed=self._draw.randrange(2**63),
                    max_tokens=self._draw.randint(1, num_tokens),
                ),
            )
            for i in range(num)
        ]

    def _prompt(self, length: int) -> tuple[int, ...]:
        vocab = self._engine.runner.decoder.config.vocab_size
        return tuple(self._draw.randrange(vocab) for _ in range(length))


def run(engine: Engine, requests: Sequence[Request]) -> Outputs:
    """The outputs of requests that are all there from the start."""
    outputs: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            outputs.setdefault(delta.id, []).extend(delta.token_ids)
    return {name: tuple(ids) for name, ids in outputs.items()}


def differences(alone: Outputs, among: Outputs) -> Iterator[Difference]:
    """The first difference of every request that has one."""
    for name, ids in alone.items():
        other = among[name]
        if ids != other:
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other))
            )
            yield Difference(name, at, *(each[at] if at < len(each) else None for each in (ids, other)))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description="Equal outputs of requests alone and among others.")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32, help="most output tokens of a request")
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves the cost out")
    parser.add_argument("--threads", type=int, default=spare_cores())
    parser.add_argument("--cache-gib", type=float, default=0.25)
    parser.add_argument("--no-native", dest="native", action="store_false", help="on a CPU, with torch alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'numbers':14} deterministic   equal of {args.requests:5}   first difference", flush=True)
    for name in args.formats:
        bench = Bench(args, name)
        for fixed in (False, True) if bench.has_choice else (False,):
            found = bench.compare(fixed)
            equal = 1 - len(found) / args.requests
            first = found[0] if found else "-"
            print(f"{name:14} {'yes' if fixed else 'no':13} {equal:16.2%}   {first}", flush=True)
        if args.rounds and bench.has_choice:
            costs = ", ".join(f"{bench.cost(num):.2f} ({num})" for num in SPEED_STREAMS)
            print(f"{'':14} deterministic takes so many times as long (streams): {costs}", flush=True)


if __name__ == "__main__":
    main()
