"""The same scenario by somebody else's client, GuideLLM (https://github.com/vllm-project/guidellm), which shares no
line with ours. Completions of given lengths, a fixed number of streams, no pause between requests.

Both ask in turns, ours, theirs, ours, theirs, so that a machine that changes its pace changes it for both.
"""

import json
import subprocess
from pathlib import Path

from loadtests.clients.__main__ import BUNDLED, CACHE, CLIENTS, installed
from loadtests.load.drive import locust
from loadtests.load.figures import summary
from loadtests.load.records import Record
from loadtests.load.scrape import Agreement

NUM_STREAMS, NUM_TOKENS, TURNS = 4, 64, 2
NAMES = {"TTFT": "time_to_first_token_ms", "TPOT": "inter_token_latency_ms", "end to end": "request_latency"}


def program() -> Path:
    """Installed as `make clients` does it. Raises what that raises."""
    installed(next(client for client in CLIENTS if client.name == "guidellm"))
    return CACHE / "guidellm" / "venv" / "bin" / "guidellm"


def compared(url: str, out: Path, turn_s: float, guidellm: Path, tokenizer: Path = BUNDLED) -> list[Agreement]:
    """Means and medians from both sides. Raises `RuntimeError` where the other client fails."""
    ours, theirs = list[Record](), list[dict[str, float]]()
    lengths = f"{NUM_TOKENS}:{NUM_TOKENS}"
    flags = ["Generate", "--dialect", "openai", "--ignore-eos", "--think-s", "0", "-u", str(NUM_STREAMS), "-r", "100"]
    flags += ["--prompt-tokens", lengths, "--output-tokens", lengths]
    for turn in range(TURNS):
        ours += locust(url, out, turn_s, [*flags, "--draw", str(turn)])
        theirs.append(_asked(url, out, len(ours) // (turn + 1), guidellm, tokenizer))
    mine, rows = summary(ours), list[Agreement]()
    spreads = {"TTFT": mine.ttft, "TPOT": mine.tpot, "end to end": mine.e2e}
    for name, spread in spreads.items():
        for what, value in (("mean", spread.mean), ("p50", spread.quantiles[0.5])):
            told = [each[f"{name} {what}"] for each in theirs]
            rows.append(Agreement(f"{name}, {what}", value, sum(told) / len(told)))
    return rows


def _asked(url: str, out: Path, num_requests: int, guidellm: Path, tokenizer: Path) -> dict[str, float]:
    """One run of theirs, in seconds."""
    found = out / "guidellm.json"
    found.unlink(missing_ok=True)
    command = [
        *(str(guidellm), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url},model=bundled,request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={NUM_TOKENS},output_tokens={NUM_TOKENS}"),
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
