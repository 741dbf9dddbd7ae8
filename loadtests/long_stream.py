"""One stream of many thousands of tokens over HTTP, on the bundled model's sizes: what each next token costs.

    python -m loadtests.long_stream --tokens 65536
    python -m loadtests.long_stream --kinds full --read 1024 8192 65536

Weights are random: nothing here depends on what they say. Each kind gets a server of its own, one after the other, with
its limits raised by flags. Told are, at each doubling of the length and for the last eighth of the way, the median gap
between two tokens and the server's processor time for each; its resident memory, and what of the cache is in use. Full
attention grows, the others should not. What still grows a little is the request's own log of ids, which a client may
read again.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Library

from loadtests.client import Stream, note, stream
from model.cache.states import bytes_per_slot
from model.cache.store import bytes_per_block
from model.config import ModelConfig
from model.families.registry import read_config
from model.kinds import Kind, read_kind
from model.nn.decoder import Decoder
from model.training.export import export
from model.training.trainer import initialise

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
KINDS = ("full", "window:256:4:4", "recurrent-memory:128:128", "linear:128", "lstm:142")
NATIVE = "full, native core"
BLOCK = 16
FIRST = 1024  # tokens of the first row
WRITTEN, WARM = 256, 32  # tokens behind a prompt, and the first of them, which are not counted
BEYOND = 64  # tokens after the last row: what has ended has no blocks any more
GAUGE = re.compile(r"^millrace_cache(_free)?_blocks(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Point:
    """One row: after so many tokens."""

    kind: str
    num_tokens: int
    gap_ms: float
    cpu_ms: float
    resident_mib: float
    cache_kib: float

    def __str__(self) -> str:
        return (
            f"| {self.kind} | {self.num_tokens:,} | {self.gap_ms:.2f} | {self.cpu_ms:.2f} | {self.resident_mib:.0f} | "
            f"{self.cache_kib:,.0f} |"
        )


def make_folder(kind: str, longest: int, folder: Path) -> Path:
    """A model folder of the bundled sizes, all of its layers of one kind."""
    config = read_config(BUNDLED)
    if kind == NATIVE:
        config = replace(config, max_position=longest)
    else:
        kinds: tuple[Kind, ...] = (read_kind(kind),) * config.num_layers
        config = replace(config, family="millrace-streams", attention=kinds, max_position=longest)
    torch.manual_seed(0)
    decoder = Decoder(config)
    initialise(decoder)
    export(decoder, Library.from_file(str(BUNDLED / "tokenizer.json")), "float32", folder)
    return folder


@contextmanager
def server(folder: Path, longest: int) -> Iterator[tuple[int, int]]:
    """A server for one stream at a time: its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--max-model-len", str(longest), "--max-num-seqs", "1", "--max-request-s", "86400", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(480):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {process.stderr.read().decode() if process.stderr else ''}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        yield port, process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


def resident_mib(pid: int) -> float:
    """Memory that a process has, with what it shares."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Looks at a server while a stream of it is read, and reports a `Point` at each doubling."""

    def __init__(self, kind: str, config: ModelConfig, port: int, pid: int, report: Callable[[Point], None]) -> None:
        self.kind, self.config, self.port, self.pid, self.report = kind, config, port, pid, report
        self.num_prompt, self.next, self.began_s = 0, FIRST, 0.0

    def note(self, result: Stream, event: dict[str, Any]) -> None:
        """An event of the stream."""
        note(result, event)
        num, first = self.num_prompt + len(result.token_ids), max(self.next * 7 // 8, self.num_prompt + WARM)
        if num >= first and not self.began_s:
            self.began_s = cpu_s(self.pid)
        if num < self.next:
            return
        gap_ms = statistics.median(result.gaps_s()[first - self.num_prompt :]) * 1e3
        cpu_ms = (cpu_s(self.pid) - self.began_s) / (num - first) * 1e3
        self.report(Point(self.kind, num, gap_ms, cpu_ms, resident_mib(self.pid), self.cache_kib()))
        self.next, self.began_s = self.next * 2, 0.0

    def cache_kib(self) -> float:
        """What of the cache is in use, and the states."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            found = {free: float(number) for free, number in GAUGE.findall(answer.read().decode())}
        in_blocks = (found[""] - found["_free"]) * bytes_per_block(self.config, BLOCK, torch.float32)
        return (in_blocks + bytes_per_slot(self.config)) / 2**10


def run(kind: str, num_tokens: int, read: Sequence[int], folder: Path, report: Callable[[Point], None]) -> None:
    """One kind's stream, or one for each length of `read`, whose last WRITTEN tokens only are written."""
    longest = num_tokens + 2 * BEYOND
    config = read_config(make_folder(kind, longest, folder))
    with server(folder, longest) as (port, pid):
        for length in read or [num_tokens]:
            watch, num_written = Watch(kind, config, port, pid, report), min(length, WRITTEN) if read else length
            prompt: object = "Once upon a time"
            if read:
                prompt = [1 + i * i % 4000 for i in range(length - num_written)]
                watch.num_prompt, watch.next = length - num_written, length
            asked = {"max_tokens": num_written + BEYOND, "ignore_eos": True, "temperature": 1.0, "seed": 1}
            done = asyncio.run(stream("127.0.0.1", port, {"prompt": prompt, **asked}, note=watch.note))
            if len(done.token_ids) != num_written + BEYOND or done.finish_reason != "length":
                raise RuntimeError(f"{kind}: {len(done.token_ids)} tokens, {done.finish_reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--kinds", nargs="+", default=[NATIVE, *KINDS])
    parser.add_argument("--read", type=int, nargs="*", default=[], help="lengths: all but the end of each is a prompt")
    parser.add_argument("--json", type=Path, help="append the rows to this file, a line of JSON each")
    args = parser.parse_args()

    def report(point: Point) -> None:
        print(point, flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")

    print("| layers | tokens | ms/token | CPU ms/token | resident MiB | cache and state KiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            run(kind, max([args.tokens, *args.read]), args.read, Path(folder) / "model", report)


if __name__ == "__main__":
    main()
