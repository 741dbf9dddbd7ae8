"""GuideLLM's benchmark, from its command line: chats and completions of given lengths."""

import json
import subprocess
from pathlib import Path

from tries import MODEL, MODEL_FOLDER, SERVER_URL, run


def bench(kind):
    found = Path(f"{kind}.json")
    found.unlink(missing_ok=True)
    command = [
        *("guidellm", "benchmark", "run", "--target", SERVER_URL, "--model", MODEL, "--processor", MODEL_FOLDER),
        *("--data", json.dumps({"prompt_tokens": 32, "output_tokens": 16}), "--profile", "concurrent", "--rate", "2"),
        *("--max-requests", "6", "--request-type", kind, "--output-path", str(found), "--disable-console-interactive"),
    ]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    if ran.returncode:
        raise RuntimeError((ran.stderr or ran.stdout).strip()[-220:])
    (told,) = json.loads(found.read_text())["benchmarks"]
    totals = told["metrics"]["request_totals"]
    return totals["successful"] == 6 and totals["errored"] == 0


run(chats=lambda: bench("chat_completions"), completions=lambda: bench("text_completions"))
