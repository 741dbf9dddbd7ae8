"""Locust as a process of its own, as a user would start it, and what it wrote down.

It decides neither load nor server.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.load import records
from loadtests.load.records import Record

ROOT = Path(__file__).parent.parent.parent
GRACE_S = 240


class Broken(Exception):
    """Locust did not run: what it said last."""


def locust(url: str, out: Path, run_s: float, flags: Sequence[str]) -> list[Record]:
    """The records of a run, and its log as `locust.log`. Raises `Broken` where there are none."""
    path = out / "records.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--headless"]
    command += ["--only-summary", "--host", url, "--records", str(path), "-t", f"{run_s:g}s", *flags]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=run_s + GRACE_S, check=False
    )
    with (out / "locust.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{ran.stdout}{ran.stderr}\n")
    found = records.read(path) if path.exists() else []
    if not found:
        raise Broken("\n".join((ran.stdout + ran.stderr).strip().splitlines()[-8:]))
    return found
