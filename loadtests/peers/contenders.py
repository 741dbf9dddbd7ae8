"""Who is measured: servers over HTTP and engines in child processes, all behind one `run`.

Each is a process of its own that waits while another is measured. What a child must answer is told by `Child`; none of
the others' code is imported here.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from loadtests.client import Stream, note, stream

Prompts = Sequence[Sequence[int]]
MARK = "@@ "  # before a child's answers, since libraries write to stdout too
START_S, RUN_S, STOP_S = 600.0, 1800.0, 60.0
FAILURES = (RuntimeError, OSError, ExceptionGroup, psutil.Error, subprocess.CalledProcessError)


@dataclass(frozen=True, slots=True)
class Run:
    """One load of prompts to its end. `cores`: processors that the contender kept busy; `foreign`: that others did,
    but for the client. Waits are known of servers only; `first_s`: until every stream had its first token, and
    `num_later` tokens came after that."""

    seconds: float
    token_ids: list[list[int]]
    cores: float
    foreign: float
    first_s: float | None = None
    num_later: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


class Contender(Protocol):
    """`run` makes `num_new` tokens for each prompt, greedily. Raises one of `FAILURES` if the process has failed."""

    name: str

    def run(self, prompts: Prompts, num_new: int) -> Run: ...
    def rss_bytes(self) -> int: ...
    def stop(self) -> None: ...


class _Process:
    """A child process, what it costs, and its end. It is talked with through `pipe`: PIPE, or DEVNULL for a server."""

    def __init__(self, name: str, command: Sequence[str], num_threads: int, log: Path, pipe: int) -> None:
        self.name, self.log = name, log
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=environment)

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children."""
        return sum(process.memory_info().rss for process in self._tree())

    def cpu_s(self) -> float:
        """Processor seconds of the process and its children so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def _tree(self) -> list[Any]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def failure(self) -> RuntimeError:
        """How the process ended, with its last words."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no word"
        return RuntimeError(f"ended with {self.process.wait()} and {last!r} (all of it in {self.log.name})")

    def stop(self) -> None:
        """End the process, and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Load:
    """Processor time of a contender and of everybody else, from here to `end`."""

    def __init__(self, process: _Process) -> None:
        self._process = process
        self._began = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        whole = psutil.cpu_times()
        busy = sum(whole) - whole.idle - whole.iowait - getattr(whole, "guest", 0) - getattr(whole, "guest_nice", 0)
        return time.monotonic(), self._process.cpu_s(), sum(psutil.Process().cpu_times()[:2]), busy

    def end(self) -> tuple[float, float]:
        """`cores` and `foreign` of a run."""
        seconds, own, client, busy = (b - a for a, b in zip(self._began, self._now(), strict=True))
        return own / seconds, max(0.0, busy - own - client) / seconds


class Child(_Process):
    """An engine in a process that answers a line of JSON, `{"prompts": ids, "num_new": n, ...}`, with one of
    `{"seconds": s, "token_ids": ids}` behind a mark. Its first answer says that it is ready."""

    def __init__(self, name: str, command: Sequence[str], num_threads: int, log: Path, **settings: object) -> None:
        super().__init__(name, command, num_threads, log, subprocess.PIPE)
        self.settings: dict[str, object] = settings
        self._answer()

    def run(self, prompts: Prompts, num_new: int) -> Run:
        assert self.process.stdin is not None
        load = Load(self)
        line = json.dumps({"prompts": [list(ids) for ids in prompts], "num_new": num_new, **self.settings})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        first_s, num_later = answer.get("first_s"), answer.get("num_later", 0)
        return Run(answer["seconds"], answer["token_ids"], *load.end(), first_s, num_later)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        raise self.failure()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked, and how its events are read."""

    path: str
    ready: str
    body: Callable[[Sequence[int], int], dict[str, object]]
    note: Callable[[Stream, dict[str, Any]], None]


def _note_llama(result: Stream, event: dict[str, Any]) -> None:
    if "error" in event:
        raise RuntimeError(f"error event: {event['error']}")
    result.token_ids += event["tokens"]
    result.token_times_s += [time.monotonic()] * len(event["tokens"])
    if event["stop"]:
        result.finish_reason = event["stop_type"]


MILLRACE = Dialect(
    "/generate",
    "/ready",
    lambda ids, num: {"prompt": list(ids), "max_tokens": num, "temperature": 0.0, "ignore_eos": True},
    note,
)
# The cheapest way to be greedy: one sampler that leaves one candidate. Its tokens are the same as with temperature 0.
LLAMA = Dialect(
    "/completion",
    "/health",
    lambda ids, num: {
        "prompt": list(ids),
        "n_predict": num,
        "ignore_eos": True,
        "cache_prompt": False,
        "samplers": ["top_k"],
        "top_k": 1,
        "return_tokens": True,
    },
    _note_llama,
)


class Served(_Process):
    """A server on a free loopback port; `{port}` in the command is that port."""

    def __init__(self, name: str, command: Sequence[str], num_threads: int, log: Path, dialect: Dialect) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = [part.replace("{port}", str(self.port)) for part in command]
        super().__init__(name, command, num_threads, log, subprocess.DEVNULL)
        self.dialect = dialect
        self._await_ready()

    def run(self, prompts: Prompts, num_new: int) -> Run:
        load = Load(self)
        began_s, streams = asyncio.run(self._streams(prompts, num_new))
        cores, foreign = load.end()
        all_began_s = max(each.token_times_s[0] for each in streams)
        return Run(
            seconds=max(each.token_times_s[-1] for each in streams) - began_s,
            token_ids=[each.token_ids for each in streams],
            cores=cores,
            foreign=foreign,
            first_s=all_began_s - began_s,
            num_later=sum(time_s > all_began_s for each in streams for time_s in each.token_times_s),
            ttfts_s=[each.ttft_s for each in streams],
            gaps_s=[gap for each in streams for gap in each.gaps_s()],
        )

    async def _streams(self, prompts: Prompts, num_new: int) -> tuple[float, list[Stream]]:
        dialect, began_s = self.dialect, time.monotonic()
        jobs = [
            stream("127.0.0.1", self.port, dialect.body(ids, num_new), dialect.path, dialect.note) for ids in prompts
        ]
        async with asyncio.timeout(RUN_S):
            return began_s, await asyncio.gather(*jobs)

    def _await_ready(self) -> None:
        url, until_s = f"http://127.0.0.1:{self.port}{self.dialect.ready}", time.monotonic() + START_S
        while time.monotonic() < until_s:
            if self.process.poll() is not None:
                raise self.failure()
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        self.stop()
        raise RuntimeError(f"{self.name} was not ready within {START_S:.0f} s")


def python(*arguments: str) -> list[str]:
    """A command for our own interpreter, unbuffered."""
    return [sys.executable, "-u", *arguments]
