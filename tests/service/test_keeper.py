"""The parent of an engine process, over small scripts in the place of engines."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.child import command
from service.keeper import MOST_FAILURES, REFUSED, Keeper

# An engine that is up, writes its process id into the file it was given, and does what the script says.
UP = "import os, pathlib, signal, sys, time; os.write(int(sys.argv[1]), b'1'); file = pathlib.Path(sys.argv[2]); "
TELL = "file.with_suffix('.new').write_text(str(os.getpid())); file.with_suffix('.new').rename(file); "
SLEEP = "time.sleep(60)"
DRAIN = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "


class Kept:
    """A keeper at work in a thread. `scripts` are what its engines do, in turn; the last one again and again."""

    def __init__(self, folder: Path, *scripts: str, drain_s: float = 30.0, margin_s: float = 10.0) -> None:
        self.folder, self.scripts = folder, scripts
        self.names: list[str] = []
        self.given_back: list[str] = []
        self.keeper = Keeper(self._command, self._give_back, drain_s, None, 0.001, margin_s)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _command(self, name: str, up: int) -> list[str]:
        script = self.scripts[min(len(self.names), len(self.scripts) - 1)]
        self.names.append(name)
        return [sys.executable, "-S", "-c", script, str(up), str(self.folder / name)]

    def _give_back(self, name: str, failed: bool) -> int:
        self.given_back.append(name)
        return 2

    def _run(self) -> None:
        self.code = self.keeper.run()

    def engine(self, index: int) -> int:
        """The process id of one of its engines, once that is there."""
        wait(lambda: len(self.names) > index and (self.folder / self.names[index]).exists())
        return int((self.folder / self.names[index]).read_text())

    def end(self) -> int | None:
        """The code of a keeper that ends by itself."""
        self.thread.join(30)
        return self.code


Keep = Callable[..., Kept]


def wait(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keep]:
    kept: list[Kept] = []

    def start(*scripts: str, **limits: float) -> Kept:
        kept.append(Kept(tmp_path, *scripts, **limits))
        return kept[-1]

    yield start
    for each in kept:
        each.keeper.stop()
        each.keeper.stop(again_kills=True)
        each.thread.join(30)


def test_a_dead_engine_s_requests_are_handed_back_and_another_with_a_new_name_takes_its_place(keep: Keep) -> None:
    kept = keep(UP + TELL + SLEEP)
    for i in range(3):
        os.kill(kept.engine(i), signal.SIGKILL)
    kept.engine(3)
    assert kept.given_back == kept.names[:3]
    assert len(set(kept.names)) == 4
    assert all(f"-{os.getpid()}-" in name for name in kept.names)


def test_a_stop_drains_the_engine_and_hands_nothing_back(keep: Keep) -> None:
    kept = keep(UP + DRAIN + TELL + SLEEP)
    pid = kept.engine(0)
    kept.keeper.stop()
    assert kept.end() == 0
    assert is_gone(pid)
    assert not kept.given_back


def test_a_stop_before_the_engine_is_up_is_clean(keep: Keep) -> None:
    kept = keep("import sys, pathlib, os, time; file = pathlib.Path(sys.argv[2]); " + TELL + SLEEP)
    kept.engine(0)
    kept.keeper.stop()
    assert (kept.end(), kept.given_back) == (0, [])


def test_an_engine_that_does_not_drain_is_killed_and_handed_back(keep: Keep) -> None:
    kept = keep(UP + DEAF + TELL + SLEEP, drain_s=0.1, margin_s=0.1)
    pid = kept.engine(0)
    kept.keeper.stop()
    assert kept.end() == 1
    assert is_gone(pid)
    assert kept.given_back == kept.names


def test_a_second_ctrl_c_waits_no_longer_and_a_second_sigterm_still_waits(keep: Keep) -> None:
    kept = keep(UP + DEAF + TELL + SLEEP)
    kept.engine(0)
    kept.keeper.stop()
    kept.keeper.stop()
    kept.thread.join(0.2)
    assert kept.code is None
    kept.keeper.stop(again_kills=True)
    assert kept.end() == 1


def test_a_refusal_at_the_first_start_is_passed_on(keep: Keep) -> None:
    kept = keep(f"import sys; sys.exit({REFUSED})")
    assert (kept.end(), len(kept.names), kept.given_back) == (REFUSED, 1, [])


def test_a_refusal_after_an_engine_was_up_is_tried_again_without_end(keep: Keep) -> None:
    refusals = [f"import sys; sys.exit({REFUSED})"] * 2 * MOST_FAILURES
    kept = keep(UP + TELL + "sys.exit(1)", *refusals[:10], UP + TELL + SLEEP)
    assert kept.engine(11)


def test_engines_that_never_come_up_are_given_up(keep: Keep) -> None:
    up, down = UP + "sys.exit(1)", "import sys; sys.exit(1)"
    kept = keep(*[down] * (MOST_FAILURES - 1), up, down)
    assert kept.end() == 1
    assert len(kept.names) == 2 * MOST_FAILURES


def test_an_engine_that_ends_well_by_itself_is_replaced(keep: Keep) -> None:
    kept = keep(UP + "sys.exit(0)", UP + TELL + SLEEP)
    kept.engine(1)
    assert not kept.given_back


PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
sys.stdin.read()
"""
CHILD = """
import os, pathlib, signal, sys, time
from service.child import die_with
die_with(os.getppid(), signal.SIGKILL)
file = pathlib.Path(sys.argv[1]); file.with_suffix(".new").write_text(str(os.getpid()))
file.with_suffix(".new").rename(file)
time.sleep(60)
"""


def test_a_child_dies_with_its_parent_however_that_went(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "pid")], stdin=subprocess.PIPE
    ) as parent:
        wait((tmp_path / "pid").exists)
        parent.kill()
    wait(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_child_whose_parent_is_gone_already_does_not_begin() -> None:
    late = "import signal; from service.child import die_with; die_with(0, signal.SIGTERM); print('alive')"
    ended = subprocess.run([sys.executable, "-c", late], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, b"")


def test_our_own_command_is_found_where_our_modules_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    told = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    assert told.stdout.startswith("usage: millrace")
    assert "    engine " not in told.stdout
