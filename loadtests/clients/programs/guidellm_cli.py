"""GuideLLM's benchmark, from its command line: chats, completions and responses of given lengths."""

import json
import subprocess
from pathlib import Path

from tries import MODEL, MODEL_FOLDER, SERVER_URL, run

NUM_REQUESTS = 6


def bench(route):
    found = Path("report.json").resolve()
    found.unlink(missing_ok=True)
    command = [
        *("guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={SERVER_URL},model={MODEL},request_format={route}"),
        *("--tokenizer", f"kind=huggingface_auto,model={MODEL_FOLDER}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--output", f"kind=json,path={found}"),
    ]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    if ran.returncode:
        raise RuntimeError((ran.stderr or ran.stdout).strip()[-220:])
    (told,) = json.loads(found.read_text())["benchmarks"]
    totals = told["metrics"]["request_totals"]
    return (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)


run(
    chats=lambda: bench("/v1/chat/completions"),
    completions=lambda: bench("/v1/completions"),
    responses=lambda: bench("/v1/responses"),
)
