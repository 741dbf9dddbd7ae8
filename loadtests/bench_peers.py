"""`make bench-peers`: our server and our bare engine beside llama-server, OpenVINO GenAI and transformers.

Random Llama checkpoints of three sizes, greedy, the same threads and precision. At each number of streams all that are
there take turns, A B C D E A B C D E, each with prompts that nobody has seen before; medians of figures and of ratios
are printed with what has been promised. On a shared machine only ratios mean much. A peer that is missing (`make peers`
brings them) proves nothing, and the bars against it say so. Between the turns memory is swept for the roofline.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from loadtests.peers.bandwidth import Bandwidth
from loadtests.peers.bars import BARE, NAMES, OURS, ROOF, TRANSFORMERS, Point, Turn
from loadtests.peers.checkpoints import HOME, NUM_SILENT, SHAPES, Shape
from loadtests.peers.contenders import FAILURES, Child, Contender
from loadtests.peers.line_up import Setting, started
from loadtests.peers.report import as_json, is_proved, row, show, summary

NUM_SWEEPS = 5
REST_S = 0.3  # after each turn, until threads that spin for a while have gone to sleep
BYTES_PER_WEIGHT = {"bf16": 2, "int8": 1}


def main() -> int:
    """The exit code: 0 if every bar was measured and met."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is stopped
    about = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": " ".join(["python -m loadtests.bench_peers", *sys.argv[1:]]),
    }
    print("\n".join(about.values()), flush=True)
    HOME.mkdir(exist_ok=True)
    points: list[Point] = []
    records: list[dict[str, object]] = []
    for size in args.models:
        for dtype in args.dtypes:
            setting = Setting(SHAPES[size], dtype, args.threads, max(args.streams), args.serve_args)
            with started(setting, [OURS, BARE, *args.peers]) as (running, left_out):
                for num_streams in args.streams:
                    point = Point(size, dtype, num_streams, args.prompt, args.tokens, left_out=dict(left_out))
                    measure(point, running, SHAPES[size], args)
                    points.append(point)
                    rows = [row(point, name, running[name].rss_bytes()) for name in point.turns]
                    show(point, rows, args.threads)
                    records.append(as_json(point, rows, args.threads))
                    if args.json:
                        args.json.write_text(json.dumps({**about, "points": records}, indent=1) + "\n")
    print(summary(points, args.threads))
    return 0 if is_proved(points, args.threads) else 1


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="S 15 M, M 135 M, L 1.1 B")
    parser.add_argument("--dtypes", nargs="+", choices=BYTES_PER_WEIGHT, default=list(BYTES_PER_WEIGHT))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each stream")
    parser.add_argument("--threads", type=int, default=2, help="that compute, for everybody")
    parser.add_argument("--serve-args", default="", help="more for `millrace serve`, in one string")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure(point: Point, running: dict[str, Contender], shape: Shape, args: argparse.Namespace) -> None:
    """Warm everybody up, then take turns. Whoever fails is left out from then on, loudly."""
    draw = random.Random(f"{point.size} {point.dtype} {point.num_streams}")

    def prompts() -> list[list[int]]:
        return [
            [draw.randrange(NUM_SILENT, shape.vocab_size) for _ in range(args.prompt)] for _ in range(point.num_streams)
        ]

    def turn(name: str, full: list[list[int]], first: list[list[int]], num_new: int) -> Turn | None:
        if name in point.left_out:
            return None
        try:
            result = Turn(running[name].run(full, num_new), running[name].run(first, 1))
        except FAILURES as error:
            point.left_out[name] = str(error)
            point.turns.pop(name, None)
            print(f"!! {name} fails and is left out: {error}", flush=True)
            return None
        time.sleep(REST_S)
        return result

    for name in running:
        for _ in range(2):
            turn(name, prompts(), prompts(), 8)
    if TRANSFORMERS not in point.left_out and isinstance(network := running[TRANSFORMERS], Child):
        choose_attention(network, prompts(), max(8, args.tokens // 4))
    point.turns = {name: [] for name in running if name not in point.left_out}
    memory = roof(point, shape, args.threads)
    for number in range(max(args.rounds, NUM_SWEEPS) if memory else args.rounds):
        full, first = prompts(), prompts()  # the same for all in a round
        if memory:
            point.sweeps.append(memory.sweep())
        for name in running if number < args.rounds else [BARE]:
            result = turn(name, full, first, args.tokens)
            if result is not None:
                point.turns[name].append(result)


def roof(point: Point, shape: Shape, num_threads: int) -> Bandwidth | None:
    """What sweeps memory at a point that is held to the roofline: one stream of a network that fits no cache."""
    if point.num_streams != 1 or point.size not in ROOF or BARE in point.left_out:
        return None
    point.step_bytes = shape.step_bytes(BYTES_PER_WEIGHT[point.dtype], point.num_prompt + point.num_new // 2)
    try:
        return Bandwidth(HOME, num_threads)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        point.left_out["sweep"] = str(error)
        print(f"!! no roofline: {error}", flush=True)
        return None


def choose_attention(network: Child, prompts: list[list[int]], num_new: int) -> None:
    """transformers' faster way to attend at this load; each is warmed up first."""
    took_s: dict[str, float] = {}
    for attention in ("sdpa", "eager"):
        network.settings["attention"] = attention
        network.run(prompts, 2)
        took_s[attention] = network.run(prompts, num_new).seconds
    network.settings["attention"] = min(took_s, key=lambda attention: took_s[attention])
    print(f"transformers: {', '.join(f'{name} {s:.2f} s' for name, s in took_s.items())}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
