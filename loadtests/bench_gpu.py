"""`make bench-gpu`: what the engine makes of a GPU, beside what the GPU can do and what transformers makes of it.

The engine alone, no HTTP: it needs nothing but torch, triton, transformers and safetensors (and what these bring). The
shares are of measured ceilings: bytes that a step must read over the bandwidth of a large copy (bytes read and
written), operations of a prompt over the rate of a large product. It leaves out, and says so, what does not fit into
its time. `--device cpu --tiny` runs the same code anywhere, to see that it runs.
"""

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from loadtests import gpu_peers
from loadtests.gpu_shapes import SHAPES, TINY_SHAPES, Shape, make_engine, random_decoder, read_bytes
from model.engine.engine import Engine
from model.nn.decoder import Decoder, as_dtype, num_parameters
from model.request import Request, SamplingParams

IDLE_US = 5.0  # a shorter pause is two kernels of one step following each other
MIXED = (256, 100, 1024)  # nano-vllm's load: sequences, least and most tokens in and out


class Bench:
    """One run: what it measured so far, and how much time is left."""

    def __init__(self, device: str, tiny: bool, budget_s: float) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.dtype = "bfloat16" if device == "cuda" else "float32"
        self.num_steps = 8 if tiny else 48
        self.rows: list[dict[str, Any]] = []
        self.bytes_per_s = self.flops_per_s = 0.0
        self._ends_s = time.monotonic() + budget_s

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(self, what: str, **figures: Any) -> None:
        self.rows.append({"what": what, **figures})
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        print(f"{what:28s} " + "   ".join(shown), flush=True)

    @contextmanager
    def part(self, name: str, needs_s: float) -> Iterator[bool]:
        """A part that may fail or be left out without taking the others along: either is said and recorded."""
        left_s = self._ends_s - time.monotonic()
        if left_s < needs_s:
            self.add(name, left_out=f"{left_s:.0f} s left, {needs_s:.0f} s needed")
            yield False
            return
        try:
            yield True
        except Exception as error:
            self.add(name, failed=f"{type(error).__name__}: {error}"[:300])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, act: Callable[[], object], num: int = 10) -> float:
        """Median seconds of `act`."""
        act()
        times = []
        for _ in range(num):
            self.sync()
            start = time.perf_counter()
            act()
            self.sync()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def machine(self) -> None:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "a CPU"
        size = 2**20 if self.tiny else 2**31
        source = torch.randint(-99, 99, (2, size), dtype=torch.int8, device=self.device)
        self.bytes_per_s = 2 * size / self.timed(lambda: source[1].copy_(source[0]))
        side = 64 if self.tiny else 8192
        matrix = torch.randn(side, side, device=self.device, dtype=as_dtype(self.dtype))
        self.flops_per_s = 2 * side**3 / self.timed(lambda: matrix @ matrix)
        self.add(
            "machine",
            name=name,
            date=datetime.date.today().isoformat(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            copy_gb_per_s=self.bytes_per_s / 1e9,
            matmul_tflop_per_s=self.flops_per_s / 1e12,
        )


def decode(bench: Bench, shape: Shape, engine: Engine, num_streams: int, context: int) -> None:
    """Steady decoding of `num_streams` sequences around `context` tokens."""
    num_steps, decoder = bench.num_steps, engine.runner.decoder
    assert isinstance(decoder, Decoder)
    names = fill(engine, num_streams, context, 3 * num_steps)
    bench.sync()
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    step_s = statistics.median(times)
    share = read_bytes(decoder, num_streams, context + num_steps) / step_s / bench.bytes_per_s
    bench.add(
        f"decode {shape.name}",
        streams=num_streams,
        context=context,
        step_ms=step_s * 1e3,
        tokens_per_s=num_streams / step_s,
        roofline=share,
        idle=idle_share(engine) if bench.device.type == "cuda" else 0.0,
    )
    for name in names:
        engine.cancel(name)
    while engine.has_work():
        engine.step()


def fill(engine: Engine, num_streams: int, context: int, num_new: int) -> list[str]:
    """Names of sequences that have come to decoding, some steps ago."""
    draw = random.Random(0)
    for i in range(num_streams):
        prompt = tuple(draw.randrange(engine.runner.decoder.config.vocab_size) for _ in range(context))
        engine.add(Request(f"r{i}", prompt, SamplingParams(temperature=0.0, max_tokens=num_new)))
    started: set[str] = set()
    while len(started) < num_streams:
        started |= {delta.id for delta in engine.step()}
    for _ in range(4):
        engine.step()
    return sorted(started)


def idle_share(engine: Engine, num_steps: int = 8) -> float:
    """The share of a few decoding steps in which the device had nothing to do for longer than between two kernels. The
    profiler slows the host down, so this is an upper bound."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if str(event.device_type) == "DeviceType.CUDA"
    )
    end, idle = spans[0][1], 0.0
    for start, stop in spans:
        idle += start - end if start - end > IDLE_US else 0.0
        end = max(end, stop)
    share: float = idle / (end - spans[0][0])
    return share


def prefill(bench: Bench, shape: Shape, engine: Engine, length: int) -> None:
    """One prompt of `length` tokens at a time."""
    decoder = engine.runner.decoder
    draw, number = random.Random(1), iter(range(100))

    def run() -> None:
        prompt = tuple(draw.randrange(decoder.config.vocab_size) for _ in range(length))
        engine.add(Request(f"p{next(number)}", prompt, SamplingParams(temperature=0.0, max_tokens=1)))
        while engine.has_work():
            engine.step()

    step_s = bench.timed(run, 5)
    operations = 2 * num_parameters(decoder) * length
    bench.add(
        f"prefill {shape.name}",
        prompt=length,
        tokens_per_s=length / step_s,
        matmul_share=operations / step_s / bench.flops_per_s,
    )


def mixed(bench: Bench, shape: Shape, engine: Engine) -> None:
    """nano-vllm's load, all of it there from the start, for us and for transformers."""
    num, least, most = (6, 4, 12) if bench.tiny else MIXED
    config = engine.runner.decoder.config
    draw, vocab = random.Random(2), config.vocab_size
    load = [
        ([draw.randrange(vocab) for _ in range(draw.randint(least, most))], draw.randint(least, most))
        for _ in range(num)
    ]
    for i, (prompt, num_new) in enumerate(load):
        engine.add(Request(f"m{i}", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=num_new)))
    start, total = time.perf_counter(), 0
    while engine.has_work():
        total += sum(len(delta.token_ids) for delta in engine.step())
    ours = total / (time.perf_counter() - start)
    bench.add(f"mixed {shape.name}", streams=num, tokens=total, tokens_per_s=ours)
    with bench.part(f"mixed {shape.name} transformers", 0 if bench.tiny else 90) as go:
        if go and bench.device.type == "cuda":
            theirs = gpu_peers.continuous(gpu_peers.build(config, as_dtype(bench.dtype), bench.device), load)
            bench.add(f"mixed {shape.name} transformers", tokens_per_s=theirs, ours_over_theirs=ours / theirs)


def same_text(bench: Bench, shape: Shape, decoder: Decoder) -> None:
    """How many of 1,000 greedy requests get the same tokens alone and among others; and what making it all costs."""
    num, num_new, seats = (6, 4, 3) if bench.tiny else (1000, 24, 256)
    draw, speeds = random.Random(3), {}
    prompts = [tuple(draw.randrange(300) for _ in range(draw.randint(4, 64))) for _ in range(num)]
    for fixed in (False, True):
        engine = make_engine(decoder, bench.device.type, seats, 128, seats * 128, fixed)

        def run(numbers: range, engine: Engine = engine) -> dict[str, list[int]]:
            for i in numbers:
                engine.add(Request(f"s{i}", prompts[i], SamplingParams(temperature=0.0, max_tokens=num_new)))
            told: dict[str, list[int]] = {}
            while engine.has_work():
                for delta in engine.step():
                    told.setdefault(delta.id, []).extend(delta.token_ids)
            return told

        start = time.perf_counter()
        together = run(range(num))
        speeds[fixed] = num * num_new / (time.perf_counter() - start)
        alone = {name: ids for i in range(num) for name, ids in run(range(i, i + 1)).items()}
        equal = sum(alone[name] == ids for name, ids in together.items()) / num
        cost = 1 - speeds[fixed] / speeds[False]
        bench.add(f"same text {shape.name}", deterministic=fixed, equal=equal, tokens_per_s=speeds[fixed], cost=cost)
        del engine


def peers(bench: Bench, shape: Shape) -> None:
    """A decoding step of transformers' `generate` at some of the shape's points."""
    network = gpu_peers.build(shape.config, as_dtype(bench.dtype), bench.device)
    for num_streams, context in shape.points[:1] + shape.points[-2:-1]:
        step_s = gpu_peers.generate(network, num_streams, context, 16)
        bench.add(
            f"generate {shape.name}",
            streams=num_streams,
            context=context,
            step_ms=step_s * 1e3,
            tokens_per_s=num_streams / step_s,
        )


def measure(bench: Bench, shape: Shape, is_last: bool) -> None:
    """Everything about one shape; the loads of many requests for the last and smallest only."""
    need = 0 if bench.tiny else 1
    room = max(num * (context + 4 * bench.num_steps) for num, context in shape.points)
    length = max(2048, *(context + 4 * bench.num_steps for _, context in shape.points))
    seats = max(num for num, _ in shape.points)
    with torch.inference_mode():
        decoder = random_decoder(shape.config, bench.dtype, bench.device)
    with bench.part(f"load {shape.name}", 40 * need) as go:
        if not go:
            return
        engine = make_engine(decoder, bench.device.type, seats, length, room)
        for num_streams, context in shape.points:
            with bench.part(f"decode {shape.name}", 15 * need) as go:
                if go:
                    decode(bench, shape, engine, num_streams, context)
        with bench.part(f"prefill {shape.name}", 10 * need) as go:
            if go:
                prefill(bench, shape, engine, 40 if bench.tiny else 2048)
        with bench.part(f"mixed {shape.name}", 40 * need) as go:
            if go and is_last:
                mixed(bench, shape, engine)
        del engine
        with bench.part(f"same text {shape.name}", 90 * need) as go:
            if go and is_last:
                same_text(bench, shape, decoder)
    del decoder
    with bench.part(f"generate {shape.name}", 20 * need) as go:
        if go and bench.device.type == "cuda":
            peers(bench, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that say nothing about speed")
    parser.add_argument("--budget-s", type=float, default=450.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, "torch sees no CUDA GPU here; --device cpu --tiny runs the same code without measuring anything\n"
        )

    bench = Bench(args.device, args.tiny, args.budget_s)
    bench.machine()
    shapes = TINY_SHAPES if args.tiny else SHAPES
    for shape in shapes:
        measure(bench, shape, is_last=shape is shapes[-1])
    if args.json:
        args.json.write_text(json.dumps(bench.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
