"""What the fault tests share: a redis-server, a model whose streams last long enough to be broken, and its oracle.

Without a redis-server they are skipped, and the end of the run says so; with REQUIRE_REDIS=1, as in CI, they fail.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.history import Unfailed
from tests.faults.procs import Cluster
from tests.faults.redis_server import RedisServer, missing
from tests.model.conftest import TINY, random_decoder, save_folder

HERE = Path(__file__).parent
# About 4 ms a step on one core: 300 tokens last a second and more, which is long for a fault.
STORYTELLER = replace(TINY, hidden_size=128, num_layers=8, max_position=1024)
MISSING = missing()
REQUIRED = os.environ.get("REQUIRE_REDIS") == "1"
MakeCluster = Callable[..., Cluster]
MakeRedis = Callable[..., RedisServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a fault test, and needs Redis."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            if MISSING and not REQUIRED:
                item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Loudly: a green run without them shows less than it seems to."""
    if MISSING and not REQUIRED:
        terminalreporter.write_sep("=", "FAULT TESTS WERE SKIPPED", yellow=True, bold=True)
        terminalreporter.write_line(f"{MISSING}. Nothing about take-over, resuming or Redis was tested.")


@pytest.fixture(scope="session", autouse=True)
def required_redis() -> None:
    """Where Redis must be, its lack is no reason to skip."""
    assert not MISSING, MISSING


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and the byte tokenizer: 256 ids, no end of sequence."""
    return save_folder(random_decoder(STORYTELLER), tmp_path_factory.mktemp("model") / "storyteller")


@pytest.fixture(scope="session")
def oracle(model_folder: Path) -> Unfailed:
    """The unfailed runs, shared by all tests."""
    return Unfailed(model_folder)


@pytest.fixture
def make_redis(tmp_path: Path) -> Iterator[MakeRedis]:
    """Servers that are gone after the test."""
    with ExitStack() as stack:
        made = 0

        def make(**options: object) -> RedisServer:
            nonlocal made
            made += 1
            return stack.enter_context(RedisServer(tmp_path / f"redis-{made}", **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def redis_server(make_redis: MakeRedis) -> RedisServer:
    """One that forgets everything when it is killed."""
    return make_redis()
