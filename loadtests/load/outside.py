"""The same scenario by somebody else's client, GuideLLM (https://github.com/vllm-project/guidellm), which shares no
line with ours. Completions of given lengths, a fixed number of streams, no pause between requests.

Both ask in turns, ours, theirs, ours, theirs, so that a machine that changes its pace changes it for both. Server and
clients get cores of their own, so that the hungrier client does not slow down what it measures; what the server saw
meanwhile tells whether it was the same scenario.
"""

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from loadtests.clients.__main__ import CACHE, CLIENTS, installed
from loadtests.load.drive import locust
from loadtests.load.figures import summary
from loadtests.load.records import Record
from loadtests.load.scrape import ITL, TTFT, Agreement, Watch
from loadtests.load.stack import Stack

NUM_STREAMS, NUM_PROMPT, NUM_OUTPUT, TURNS = 4, 256, 64, 2
NAMES = {"TTFT": "time_to_first_token_ms", "TPOT": "inter_token_latency_ms", "end to end": "request_latency"}


def program() -> Path:
    """Installed as `make clients` does it. Raises what that raises."""
    installed(next(client for client in CLIENTS if client.name == "guidellm"))
    return CACHE / "guidellm" / "venv" / "bin" / "guidellm"


def compared(stack: Stack, out: Path, turn_s: float, guidellm: Path, tokenizer: Path) -> list[Agreement]:
    """Means and medians from both sides. Raises `RuntimeError` where the other client fails."""
    url, ours, theirs = stack.url, list[Record](), list[dict[str, float]]()
    seen: tuple[list[Watch], list[Watch]] = [], []
    flags = ["Generate", "--dialect", "openai", "--ignore-eos", "--think-s", "0", "-u", str(NUM_STREAMS), "-r", "100"]
    flags += ["--prompt-tokens", str(NUM_PROMPT), "--output-tokens", str(NUM_OUTPUT)]
    with apart(stack.pids):
        for turn in range(TURNS):
            with Watch(stack.metrics_urls) as watch:
                ours += locust(url, out, turn_s, [*flags, "--draw", str(turn)])
            seen[0].append(watch)
            with Watch(stack.metrics_urls) as watch:
                theirs.append(_asked(url, out, len(ours) // (turn + 1), guidellm, tokenizer))
            seen[1].append(watch)
    mine, rows = summary(ours), list[Agreement]()
    spreads = {"TTFT": mine.ttft, "TPOT": mine.tpot, "end to end": mine.e2e}
    for name, spread in spreads.items():
        for what, value in (("mean", spread.mean), ("p50", spread.quantiles[0.5])):
            told = [each[f"{name} {what}"] for each in theirs]
            rows.append(Agreement(f"{name}, {what}", value, sum(told) / len(told)))
    for name, what in ((TTFT, "TTFT"), (ITL, "inter-token")):
        own, other = (sum(watch.spread(name).mean for watch in side) / TURNS for side in seen)
        rows.append(Agreement(f"the server's {what} meanwhile, mean", own, other))
    return rows


@contextmanager
def apart(pids: Iterable[int]) -> Iterator[None]:
    """Meanwhile the first half of the cores for these processes, the other half for this one and its children. With one
    core, or another system than Linux, nothing changes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    half = len(cores) // 2
    if not half:
        yield
        return
    _put(pids, cores[:half])
    os.sched_setaffinity(0, cores[half:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        _put(pids, cores)


def _put(pids: Iterable[int], cores: Iterable[int]) -> None:
    """Every thread of them, and of their children."""
    for pid in pids:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


def _model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _asked(url: str, out: Path, num_requests: int, guidellm: Path, tokenizer: Path) -> dict[str, float]:
    """One run of theirs, in seconds."""
    found = out / "guidellm.json"
    found.unlink(missing_ok=True)
    command = [
        *(str(guidellm), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url},model={_model(url)},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={NUM_PROMPT},output_tokens={NUM_OUTPUT}"),
        *("--profile", f"kind=concurrent,streams={NUM_STREAMS}"),
        *("--constraint", f"kind=max_requests,count={num_requests}"),
        *("--output", f"kind=json,path={found.resolve()}"),
    ]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400, cwd=out)
    if ran.returncode or not found.exists():
        raise RuntimeError(f"guidellm: {(ran.stderr or ran.stdout).strip()[-400:]}")
    (told,) = json.loads(found.read_text())["benchmarks"]
    figures = {}
    for name, theirs in NAMES.items():
        spread, scale = told["metrics"][theirs]["successful"], 1e3 if theirs.endswith("_ms") else 1.0
        figures[f"{name} mean"] = spread["mean"] / scale
        figures[f"{name} p50"] = spread["percentiles"]["p50"] / scale
    return figures
