"""The GPU benchmark runs from end to end where there is no GPU: a run on one must not be spent on finding slips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCH = [sys.executable, "-m", "loadtests.bench_gpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_it_runs_anywhere_in_tiny(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [*BENCH, "--device", "cpu", "--tiny", "--json", str(report)]
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True, timeout=110)
    rows = json.loads(report.read_text())
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    assert {row["what"].split()[0] for row in rows} == {"machine", "decode", "prefill", "mixed", "same"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run(BENCH, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 2 and "no CUDA GPU" in run.stderr
