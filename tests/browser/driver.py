"""The chromium that browser tests share, as a test sees it: play a scenario, do what it wants in between.

It knows processes and lines of JSON; what a person does in a browser is in `writing.mjs` and `failing.mjs`.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Where it is."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    if chromium() is None or shutil.which("node") is None:
        return "chromium or node is not on PATH; deploy/browser.sh installs them"
    wanted = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    for name, version in wanted.items():
        there = HERE / "node_modules" / name / "package.json"
        if not there.is_file() or json.loads(there.read_text(encoding="utf-8"))["version"] != version:
            return f"{name} {version} is not in tests/browser/node_modules; deploy/browser.sh installs it"
    return None


class Browser:
    """`with Browser(folder) as browser`; screenshots go to the folder. It starts when first needed."""

    def __init__(self, shots: Path) -> None:
        self.shots = shots
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def play(self, scenario: str, wants: Mapping[str, Callable[[], object]] | None = None, **given: object) -> Any:
        """What the scenario returns. `wants` are what it may ask for. Raises `AssertionError` for its failure."""
        if self._process is None:
            self._start()
        try:
            self._say({"scenario": scenario, **given})
            while "wants" in (told := self._told()):
                self._say((wants or {})[told["wants"]]())
        except BaseException:  # pytest's time limit too: what the driver says later would be taken for another answer
            self.close()
            raise
        assert "failed" not in told, told["failed"]
        return told["done"]

    def close(self) -> None:
        """End it, if it runs."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            process.stdout.close()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        command = ["node", str(HERE / "driver.mjs"), str(chromium()), str(self.shots)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=HERE)
        self._told()

    def _say(self, data: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(data) + "\n")
        self._process.stdin.flush()

    def _told(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the browser's driver has ended"
        told: dict[str, Any] = json.loads(line)
        return told
