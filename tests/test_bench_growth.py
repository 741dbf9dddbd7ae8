"""The growth benchmark runs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_it_runs_in_tiny_and_draws_its_plot(tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "growth.png"
    command = [sys.executable, "-m", "loadtests.bench_growth", "--tiny", "--threads", "1"]
    command += ["--json", str(report), "--plot", str(picture)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=110)
    rows = json.loads(report.read_text())
    assert [row["batch"] for row in rows["steps"]] == [1, 4] and rows["queue"][1]["add_us"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
