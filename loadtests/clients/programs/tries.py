"""What every program here shares: one line for each thing that was tried. It runs in a foreign environment, so it
imports nothing of ours."""

import os
import sys
from collections.abc import Callable

BASE_URL, SERVER_URL, MODEL = (os.environ.get(name, "") for name in ("BASE_URL", "SERVER_URL", "MODEL"))
MODEL_FOLDER = os.environ.get("MODEL_FOLDER", "")
ASK = [{"role": "user", "content": "Tell me a story about a fox."}]
PARAMETERS = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "hen", "owl"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["animal", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look it up.", "parameters": PARAMETERS}}


def run(**tries: Callable[[], object]) -> None:
    """Each by its name, underscores as spaces; a false result or an exception is a failure."""
    failed = False
    for name, attempt in tries.items():
        what = name.replace("_", " ")
        try:
            result = attempt()
            how = "ok" if result is None or result else f"got {result!r}"
        except Exception as error:
            how = f"{type(error).__name__}: {' '.join(str(error).split())}"[:240].replace("|", "/")
        failed |= how != "ok"
        print(f"{what}: {how}", flush=True)
    sys.exit(failed)
