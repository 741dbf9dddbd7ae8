"""The benchmarks of number formats run from end to end: what they measure is not looked at here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.same_text import Difference, Outputs, differences

ROOT = Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("bench", "flags"),
    [
        ("perplexity", ["--windows", "1", "--window", "32", "--rounds", "1", "--streams", "1"]),
        ("same_text", ["--formats", "float32-int8", "--requests", "4", "--tokens", "3"]),
    ],
)
def test_it_runs_on_the_bundled_model(bench: str, flags: list[str]) -> None:
    command = [sys.executable, "-m", f"loadtests.{bench}", "--device", "cpu", "--threads", "1", *flags]
    run = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True, text=True, timeout=110)
    assert "float32-int8" in run.stdout
    assert "100.00%" in run.stdout or bench == "perplexity"


def test_the_first_difference_of_each_output_is_found() -> None:
    alone: Outputs = {"a": (1, 2), "b": (1, 2), "c": (1,)}
    among: Outputs = {"a": (1, 2), "b": (1, 3), "c": (1, 4)}
    assert list(differences(alone, among)) == [Difference("b", 1, 2, 3), Difference("c", 1, None, 4)]
