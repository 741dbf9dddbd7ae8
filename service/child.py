"""One process of ours starts another: how it is called, and that it does not outlive who started it.

A part of the composition root. It knows no settings and nothing of what either process does.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)
KEEPER_GONE = signal.SIGUSR1  # ends an engine that is still loading; one that computes hands its requests back first
POLL_S = 0.5


def command(*words: str) -> list[str]:
    """The `millrace` command with these words, to be found where this process found its own modules: the working
    folder is searched only if this process searches it."""
    isolated = [] if str(Path.cwd()) in sys.path else ["-P"]
    return [sys.executable, *isolated, "-m", "service.cli", *words]


def die_with(parent: int, by: signal.Signals) -> None:
    """Have this process signalled when the one that started it, process id `parent`, is gone: however it went, and also
    if it is gone already. To be called first of all, by the main thread.

    Linux does it by itself; it counts the end of the thread that started us as the end of the parent, so processes are
    started by main threads only. Elsewhere a thread looks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(by), 0, 0, 0)
    else:
        threading.Thread(target=_look, args=(parent, by), name="parent", daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), by)


def _look(parent: int, by: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), by)
