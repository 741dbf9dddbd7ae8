"""`make bench`: tokens/s of the bare engine against the same load through HTTP streaming, embedded and over Redis.

They are measured in turn, A B C A B C, in one run on one machine, and medians are printed: on a shared machine only the
ratio means much. While one is measured the others are idle (an idle engine waits, it does not poll). Without a
redis-server the third is left out.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtests.client import Stream, stream
from model.engine.engine import Engine
from model.request import Request, SamplingParams
from service.work import spare_cores
from tests.faults.redis_server import RedisServer, missing

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
PROMPT = (
    "Once upon a time there was a little old woman who lived in a small house at the edge of a great forest, and every "
    "morning she went out to feed her hens and to look down the long white road that led to the town."
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: output tokens/s over all streams, and waits in milliseconds."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float


def figures(streams: list[Stream], started_s: float) -> Figures:
    ended_s = max(s.token_times_s[-1] for s in streams)
    ttfts = sorted(s.ttft_s * 1e3 for s in streams)
    gaps = sorted(gap * 1e3 for s in streams for gap in s.gaps_s())
    total = sum(len(s.token_times_s) for s in streams)
    waits = [_quantile(ordered, q) for ordered in (ttfts, gaps) for q in (0.5, 0.99)]
    return Figures(total / (ended_s - started_s), *waits)


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def bare(engine: Engine, num_streams: int, num_tokens: int) -> Figures:
    """The load straight into the engine: no broker, no HTTP, no text."""
    prompt_ids = tuple(engine.tokenizer.encode(PROMPT))
    started = time.monotonic()
    streams = {f"s{i}": Stream(started) for i in range(num_streams)}
    for i, name in enumerate(streams):
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=num_tokens)
        engine.add(Request(name, prompt_ids, sampling))
    while engine.has_work():
        deltas = engine.step()
        now = time.monotonic()
        for delta in deltas:
            streams[delta.id].token_times_s += [now] * len(delta.token_ids)
    return figures(list(streams.values()), started)


async def over_http(port: int, num_streams: int, num_tokens: int) -> Figures:
    started = time.monotonic()
    # Every parameter is named, for the model's own defaults would not be those of the bare engine.
    sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, **sampling}
    jobs = [stream("127.0.0.1", port, {**body, "seed": i}) for i in range(num_streams)]
    return figures(await asyncio.gather(*jobs), started)


@contextmanager
def server(folder: Path, num_threads: int, *flags: str) -> Iterator[int]:
    """A `millrace serve` of its own on a free loopback port, ended with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(folder)]
    command += ["--port", str(port), "--threads", str(num_threads), *flags]
    # A file, and no pipe: its lines would fill one that nobody reads, and the server stand still.
    said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        for _ in range(240):
            if process.poll() is not None:
                said.seek(0)
                raise RuntimeError(f"the server ended: {said.read().decode()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=spare_cores(), help="that compute, in both; default: cores - 1")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    engine = Engine.load(args.model)
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        ports = {"http": stack.enter_context(server(args.model, args.threads))}
        if missing() is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            redis = stack.enter_context(RedisServer(folder, appendonly=True))
            ports["redis"] = stack.enter_context(server(args.model, args.threads, "--redis-url", redis.url))
        for num_streams in args.streams:
            runs: dict[str, list[Figures]] = {"engine": [], **{name: [] for name in ports}}
            for turn in range(args.rounds + 1):
                results = {"engine": bare(engine, num_streams, args.tokens)}
                for name, port in ports.items():
                    results[name] = asyncio.run(over_http(port, num_streams, args.tokens))
                if turn:  # the first turn warms them up
                    for name, result in results.items():
                        runs[name].append(result)
            rows += report(num_streams, runs)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def report(num_streams: int, runs: dict[str, list[Figures]]) -> list[dict[str, object]]:
    """Print and return the medians of one load, and which share each path keeps of another (median of turns)."""
    rows: list[dict[str, object]] = []
    for name, results in runs.items():
        medians = {f: statistics.median(getattr(r, f) for r in results) for f in Figures.__slots__}
        rows.append({"streams": num_streams, "path": name, **medians})
        print(
            f"{num_streams:4d} streams  {name:6s} {medians['tokens_per_s']:8.0f} tok/s   "
            f"first token p50 {medians['ttft_p50_ms']:6.1f} p99 {medians['ttft_p99_ms']:6.1f} ms   "
            f"between p50 {medians['gap_p50_ms']:6.2f} p99 {medians['gap_p99_ms']:6.2f} ms",
            flush=True,
        )
    for name, base in (("http", "engine"), ("redis", "http")):
        pairs = list(zip(runs[base], runs.get(name, ()), strict=False))
        if pairs:
            ratio = statistics.median(b.tokens_per_s / a.tokens_per_s for a, b in pairs)
            print(f"{num_streams:4d} streams  {name} keeps {ratio:.1%} of {base}", flush=True)
            rows.append({"streams": num_streams, "path": name, f"share_of_{base}": ratio})
    return rows


if __name__ == "__main__":
    main()
