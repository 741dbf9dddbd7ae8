"""A tiny model that is served, and Locust as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtests.load import records
from loadtests.load.records import Record
from tests.model.conftest import TINY, random_decoder, save_folder
from tests.test_serve import Served, serving

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., tuple[int, list[Record], str]]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(random_decoder(TINY), tmp_path_factory.mktemp("load") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Served]:
    with open(os.devnull, "w") as nowhere, serving(tiny_folder, log=nowhere.fileno()) as running:
        yield running


@pytest.fixture
def locust(tiny: Served, tmp_path: Path) -> Run:
    """The exit code, the records and the output of a run against the tiny server."""

    def run(*flags: str) -> tuple[int, list[Record], str]:
        path = tmp_path / "records.jsonl"
        command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
        command += [
            "--host",
            tiny.url(""),
            "--records",
            str(path),
            "--prompt-tokens",
            "8:40",
            "--output-tokens",
            "4:24",
        ]
        ran = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        return ran.returncode, records.read(path) if path.exists() else [], ran.stdout + ran.stderr

    return run
