"""What the browser tests share: one Chromium, and one server of the bundled storyteller.

Without chromium, node or what tests/browser/package.json names they are skipped, and the end of the run says so; with
REQUIRE_BROWSER=1, as in CI, they fail. Screenshots are kept where SCREENSHOTS says, else in pytest's own folder.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.browser.driver import Browser, missing
from tests.faults.procs import START_S, Process, wait
from tests.faults.redis_server import free_port

HERE = Path(__file__).parent
MISSING = missing()
REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the browser."""
    for item in items:
        if HERE in item.path.parents and MISSING and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The one that all share; each scenario has a profile of its own."""
    assert not MISSING, MISSING
    shots = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    with Browser(shots) as browser:
        yield browser


class Storyteller:
    """`millrace serve` of the bundled model, that can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Of the chat page."""
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Until it is ready. Raises `AssertionError`, with what it said."""
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(self.port), "--threads", "1"]
        self._process = process = Process("serve", command, self._folder / "serve.log")
        try:
            wait(lambda: not process.alive() or self._is_ready(), "the server is ready", START_S)
        finally:
            assert process.alive(), process.said()

    def kill(self) -> None:
        """As the kernel does it, if it runs."""
        if self._process is not None:
            self._process.clear()

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}ready").status_code == 200
        return False


@pytest.fixture(scope="session")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storyteller]:
    """Shared by all tests; whoever kills it starts it again."""
    server = Storyteller(tmp_path_factory.mktemp("storyteller"))
    try:
        server.start()
        yield server
    finally:
        server.kill()
