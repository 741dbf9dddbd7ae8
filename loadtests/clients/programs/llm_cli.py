"""Simon Willison's `llm`, from its command line."""

import json
import os
import subprocess
from pathlib import Path

from tries import BASE_URL, MODEL, PARAMETERS, run

FOLDER = Path.cwd() / "user"
FOLDER.mkdir(exist_ok=True)
ABOUT = {"model_id": "mill", "model_name": MODEL, "api_base": BASE_URL, "api_key_name": "mill", "supports_schema": True}
FOLDER.joinpath("extra-openai-models.yaml").write_text(json.dumps([ABOUT | {"supports_tools": True}]))
FOLDER.joinpath("keys.json").write_text('{"mill": "none"}')


def llm(*words: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER)}
    ran = subprocess.run(["llm", *words], check=False, env=environment, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip()[-200:])
    return ran.stdout.strip()


run(
    stream=lambda: llm("-m", "mill", "-o", "max_tokens", "20", "Tell me a story."),
    whole=lambda: llm("-m", "mill", "--no-stream", "-o", "max_tokens", "20", "Tell me a story."),
    system_prompt=lambda: llm("-m", "mill", "-s", "Be brief.", "-o", "max_tokens", "9", "Tell me a story."),
    schema=lambda: json.loads(llm("-m", "mill", "--schema", json.dumps(PARAMETERS), "A fox."))["animal"],
)
