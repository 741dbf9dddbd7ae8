"""NVIDIA's AIPerf, from its command line: streamed chats and completions of given lengths."""

import json
import os
import subprocess
from pathlib import Path

from tries import MODEL, MODEL_FOLDER, SERVER_URL, run


def profile(kind):
    folder = Path(f"artifacts-{kind}")
    command = [
        *("aiperf", "profile", "--model", MODEL, "--url", SERVER_URL, "--endpoint-type", kind, "--streaming"),
        *("--tokenizer", MODEL_FOLDER, "--request-count", "6", "--concurrency", "2", "--ui", "none"),
        *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--output-artifact-dir", str(folder)),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:16"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=environment)
    if ran.returncode:
        raise RuntimeError((ran.stderr or ran.stdout).strip()[-220:])
    told = json.loads(next(folder.glob("profile_export_aiperf.json")).read_text())
    return told["request_count"]["avg"] == 6 and not told.get("error_summary")


run(chats=lambda: profile("chat"), completions=lambda: profile("completions"))
