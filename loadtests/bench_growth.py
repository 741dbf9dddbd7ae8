"""`make bench-growth`: how the cost of a step grows with the batch, the context and the line of those who wait, how
much of it is the scheduler's own, and how long a prompt that arrives holds up those who decode.

The bare engine on this machine, random weights in the shape of a 15 M Llama. Contexts are not computed but declared: a
cache of zeros takes as long to read. Beyond `DISTINCT` tokens several sequences have the same blocks as context, so
that the memory suffices. Absolute times are this machine's and this moment's; what counts is how they grow.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loadtests.gpu_shapes import BUNDLED, TINY, random_decoder
from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.sequence import Sequence as Generated
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer

LLAMA_15M = ModelConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=288,
    num_layers=6,
    num_heads=6,
    num_kv_heads=6,
    head_dim=48,
    intermediate_size=768,
    max_position=32_768,
)
BATCHES, CONTEXTS, LINES = (1, 4, 16, 64, 256), (128, 1024, 4096, 16_384), (0, 1_000, 10_000, 100_000)
DISTINCT, MOST = 65_536, 1_048_576  # tokens of contexts that differ; tokens of context that a step may read
STREAMS = 16  # that decode when a long prompt arrives
Row = dict[str, Any]


class Timed:
    """An engine whose scheduler's own time is measured: `own_s` grows with every `plan`, `advance` and `commit`."""

    def __init__(self, config: ModelConfig, length: int, num_seqs: int, dtype: str) -> None:
        blocks = DISTINCT // 16 + num_seqs * 8 + 2 * length // 16
        self.engine = Engine(
            random_decoder(config, dtype, torch.device("cpu")),
            Tokenizer.load(BUNDLED),
            EngineConfig("cpu", dtype, length, num_seqs, max(512, num_seqs), num_blocks=blocks),
        )
        self.own_s = self.decode_s = 0.0
        self._depth = 0
        scheduler = self.engine.scheduler
        for name in ("plan", "advance", "commit"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self._depth += 1
            began_s = time.perf_counter()
            try:
                return call(*args)
            finally:
                self._depth -= 1
                if not self._depth:  # `commit` calls `advance`
                    self.own_s += time.perf_counter() - began_s

        return timed

    def declare(self, prompt: tuple[int, ...]) -> None:
        """Have a prompt found as if it had been computed."""
        scheduler, size = self.engine.scheduler, self.engine.config.block_size
        sequence = Generated(Request("declared", prompt), len(prompt) + 1)
        sequence.blocks = scheduler.pool.take(len(prompt) // size)
        scheduler.prefixes.computed(sequence, 0, len(prompt))
        scheduler.pool.give_back(sequence.blocks)

    def fill(self, num: int, context: int) -> None:
        """`num` sequences that decode, each with so much context."""
        rng, vocabulary = random.Random(num * context), self.engine.runner.decoder.config.vocab_size
        prompts = [
            tuple(rng.randrange(vocabulary) for _ in range(context))
            for _ in range(max(1, min(num, DISTINCT // context)))
        ]
        for prompt in prompts:
            self.declare(prompt)
        for i in range(num):
            self.engine.add(Request(f"s{i}", prompts[i % len(prompts)], SamplingParams(max_tokens=10**6)))
        while self.engine.scheduler.num_waiting or self.engine.stats().last_rows != num:
            self.engine.step()

    def empty(self, names: Sequence[str]) -> None:
        """End these; what was found is forgotten."""
        for name in names:
            self.engine.cancel(name)
        if not self.engine.has_work():
            pool = self.engine.scheduler.pool
            pool.forget(range(pool.num_blocks))

    def steps(self, least: int, seconds: float) -> tuple[float, float]:
        """Medians of at least so many steps, for so long: a step, and the scheduler's own part of it, in seconds."""
        steps, own = list[float](), list[float]()
        ends_s = time.perf_counter() + seconds
        while len(steps) < least or time.perf_counter() < ends_s:
            before_s, self.own_s = time.perf_counter(), 0.0
            self.engine.step()
            steps.append(time.perf_counter() - before_s)
            own.append(self.own_s)
        return statistics.median(steps), statistics.median(own)


def grow(timed: Timed, batches: Sequence[int], contexts: Sequence[int], seconds: float) -> list[Row]:
    """Step times by batch and context; without times where it would be too much."""
    rows: list[Row] = []
    for context in contexts:
        for batch in batches:
            row: Row = {"batch": batch, "context": context}
            if batch * context <= MOST:
                timed.fill(batch, context)
                step_s, own_s = timed.steps(3, seconds)
                timed.empty([f"s{i}" for i in range(batch)])
                row |= {"step_ms": step_s * 1e3, "scheduler_us": own_s * 1e6, "share": own_s / step_s}
            rows.append(row)
            print_row("step", row)
    return rows


def queue(timed: Timed, batch: int, lines: Sequence[int], seconds: float) -> list[Row]:
    """With a full batch: the scheduler's own time by the number of those who wait, and what one more costs."""
    rows: list[Row] = []
    timed.fill(batch, 128)
    num_waiting = 0
    for line in lines:
        adds = list[float]()
        for i in range(num_waiting, line):
            request = Request(f"w{i}", (1, 2, 3), SamplingParams(max_tokens=1))
            before_s = time.perf_counter()
            timed.engine.add(request)
            adds.append(time.perf_counter() - before_s)
        num_waiting = line
        step_s, own_s = timed.steps(5, seconds)
        row = {"waiting": line, "running": batch, "step_ms": step_s * 1e3, "scheduler_us": own_s * 1e6}
        rows.append(row | {"share": own_s / step_s, "add_us": statistics.median(adds) * 1e6 if adds else 0.0})
        print_row("queue", rows[-1])
    timed.empty([f"s{i}" for i in range(batch)] + [f"w{i}" for i in range(num_waiting)])
    return rows


def arrive(timed: Timed, length: int, paced: bool, seconds: float) -> Row:
    """Streams decode, and a long prompt arrives: their time between two tokens while it is read, against before."""
    engine = timed.engine
    timed.fill(STREAMS, 128)
    decode_s, _ = timed.steps(10, seconds)
    rng, vocabulary = random.Random(length + paced), engine.runner.decoder.config.vocab_size
    engine.add(
        Request("long", tuple(rng.randrange(vocabulary) for _ in range(length)), SamplingParams(max_tokens=10**6))
    )
    budget = engine.scheduler.pace.budget
    if not paced:
        engine.scheduler.pace.budget = lambda *counts: engine.config.max_batch_tokens  # type: ignore[method-assign]
    steps, began_s = list[float](), time.perf_counter()
    while True:
        before_s = time.perf_counter()
        deltas = engine.step()
        steps.append(time.perf_counter() - before_s)
        if any(delta.id == "long" and delta.token_ids for delta in deltas):
            break
    ttft_s = time.perf_counter() - began_s
    engine.scheduler.pace.budget = budget  # type: ignore[method-assign]
    timed.empty([f"s{i}" for i in range(STREAMS)] + ["long"])
    p99_s = sorted(steps)[int(0.99 * (len(steps) - 1))]
    return {
        "prompt": length, "paced": paced, "decode_ms": decode_s * 1e3, "median_ms": statistics.median(steps) * 1e3,
        "p99_ms": p99_s * 1e3, "p99_over_decode": p99_s / decode_s, "ttft_ms": ttft_s * 1e3, "steps": len(steps),
    }  # fmt: skip


def arrivals(timed: Timed, length: int, rounds: int, seconds: float) -> list[Row]:
    """With chunks that follow the pace, and without, in turn; the first round, in which it is learnt, is left out."""
    rows: list[Row] = []
    for number in range(2 * rounds + 2):
        row = arrive(timed, length, number % 2 == 0, seconds)
        if number > 1:
            rows.append(row)
            print_row("arrival", row)
    return rows


def print_row(what: str, row: Row) -> None:
    """One line, as it is known."""
    told = (f"{name} {value:9.4g}" if isinstance(value, float) else f"{name} {value:>7}" for name, value in row.items())
    print(f"{what:8s}" + "   ".join(told) + ("" if len(row) > 2 else "   too much for a step"), flush=True)


def plot(rows: list[Row], lines: list[Row], path: Path) -> None:
    """The two tables as curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for context in sorted({row["context"] for row in rows}):
        known = [row for row in rows if row["context"] == context and "step_ms" in row]
        left.plot(
            [r["batch"] for r in known], [r["step_ms"] for r in known], "o-", label=f"{context:,} tokens of context"
        )
    left.set(xscale="log", yscale="log", xlabel="sequences in a step", ylabel="step, ms", title="Step time")
    left.legend()
    waiting = [max(1, row["waiting"]) for row in lines]
    right.plot(waiting, [row["scheduler_us"] for row in lines], "o-", label="scheduler, a step")
    right.plot(waiting[1:], [row["add_us"] for row in lines[1:]], "s-", label="adding a request")
    right.set(xscale="log", yscale="log", xlabel="requests that wait", ylabel="µs", title="The scheduler's own time")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["steps", "queue", "arrival"])
    parser.add_argument("--tiny", action="store_true", help="a quick run of all of it, to see that it runs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each point")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt that arrives")
    parser.add_argument("--rounds", type=int, default=3, help="of arrivals")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, length, batches = (TINY, 1024, (1, 4)) if args.tiny else (LLAMA_15M, 16_384 + 512, BATCHES)
    timed = Timed(shape, length, batches[-1], args.dtype)
    seconds = 0.0 if args.tiny else args.seconds
    report: dict[str, list[Row]] = {}
    if args.only in (None, "steps"):
        report["steps"] = grow(timed, batches, CONTEXTS[:1] if args.tiny else CONTEXTS, seconds)
    if args.only in (None, "queue"):
        report["queue"] = queue(timed, batches[-1], LINES[:2] if args.tiny else LINES, seconds)
    if args.only in (None, "arrival") and not args.tiny:
        report["arrival"] = arrivals(timed, args.prompt, args.rounds, seconds)
    for path in (args.json, args.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot and {"steps", "queue"} <= report.keys():
        plot(report["steps"], report["queue"], args.plot)


if __name__ == "__main__":
    main()
