"""`millrace worker`: the parent of an engine process, which hands its requests back the moment it dies and starts it
again. A part of the composition root.

An engine can be killed, run out of memory or crash in a driver, and then cannot tell anybody. Its requests would wait
until its lease has run out; its parent knows at once. That is all that this process does: it holds no connection, no
model and no request, so that there is little in it that could fail. Every engine has a name of its own, so nothing that
an old one left can be mistaken for the new one's.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue

from service.broker.redis import check, hand_back
from service.child import command
from service.logs import configure
from service.settings import Settings

REFUSED = 3  # the exit code by which an engine says in one line that it can't start
HELD_NOTHING = (0, REFUSED, -signal.SIGTERM)  # the last: it had not begun, or it would have drained
KILLED = -signal.SIGKILL  # by an operator, by a system out of memory: perhaps for a request's sake, perhaps not
MARGIN_S = 10.0  # beyond the drain's own time, for its last commits and the way out
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
MOST_FAILURES = 8  # engines in a row that ended before they were up

logger = logging.getLogger(__name__)


def keep(settings: Settings) -> None:
    """Keep an engine alive until a signal comes; exits with the keeper's code. Raises `StartupError` for a Redis that
    can't be used, which an engine would find out seconds later."""
    configure(settings.log_level, as_json=settings.log_json)
    url = settings.queue_url
    assert url is not None
    check(url)
    keeper = Keeper(
        lambda name, up: command("engine", "--name", name, "--keeper", str(os.getpid()), "--up", str(up)),
        lambda name, failed: hand_back(url, name, failed),
        settings.drain_s,
        settings.environment(),
    )
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    signal.signal(signal.SIGINT, lambda *_: keeper.stop(again_kills=True))
    sys.exit(keeper.run())


class Keeper:
    """`engine_command` gives the words that start an engine of that name, which writes a byte to that file descriptor
    when it is up. `give_back` tells Redis that an engine is dead, and whether it failed by itself, and returns how many
    requests it had, or -1 if Redis can't be told."""

    def __init__(
        self,
        engine_command: Callable[[str, int], list[str]],
        give_back: Callable[[str, bool], int],
        drain_s: float,
        environment: Mapping[str, str] | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
        margin_s: float = MARGIN_S,
    ) -> None:
        self._command, self._give_back, self._environment = engine_command, give_back, environment
        self._patience_s, self._first_pause_s = drain_s + margin_s, first_pause_s
        self._events: SimpleQueue[int | None] = SimpleQueue()  # an engine's exit code; None: look whether to stop
        self._stopping = self._hurried = False

    def stop(self, again_kills: bool = False) -> None:
        """Drain the engine and return from `run`. May be called by a signal handler, and again: then, with
        `again_kills`, it waits no longer."""
        self._hurried = self._hurried or (again_kills and self._stopping)
        self._stopping = True
        self._events.put(None)

    def run(self) -> int:
        """Until `stop`: then 0, or 1 if the engine did not drain. Earlier with 3, if the first engine refused to start,
        and with 1, if none comes up any more."""
        was_up, num_failures, pause_s = False, 0, self._first_pause_s
        while not self._stopping:
            code, up = self._live(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
            if self._stopping:
                return 0 if code in HELD_NOTHING else 1
            if up:
                was_up, num_failures, pause_s = True, 0, self._first_pause_s
            elif code != REFUSED:
                num_failures += 1
            elif not was_up:
                return REFUSED
            # What was fine once and is refused now, as when Redis is away, may be fine again: that is tried for ever.
            if num_failures == MOST_FAILURES:
                logger.error("%d engines in a row ended before they were up; giving up", num_failures)
                return 1
            self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return 0

    def _live(self, name: str) -> tuple[int, bool]:
        """One engine from start to end, with what it held given back. Its exit code, below 0 a signal's number, and
        whether it was ever up."""
        told, up = os.pipe()
        with open(told, "rb", buffering=0) as reader:
            with open(up, "wb", buffering=0):  # closed here once the engine has its own
                # Of its own session: Ctrl-C at a terminal is for the keeper, who then tells the engine.
                engine = subprocess.Popen(
                    self._command(name, up), env=self._environment, pass_fds=(up,), start_new_session=True
                )
            threading.Thread(target=lambda: self._events.put(engine.wait()), name="wait", daemon=True).start()
            code = self._outlive(engine)
            os.set_blocking(told, False)
            was_up = bool(reader.read(1))
        if code not in HELD_NOTHING:
            num = self._give_back(name, code != KILLED)
            fate = f"its {num} requests are back in the queue" if num >= 0 else "its requests wait for its lease to end"
            logger.error("engine %s ended with %d; %s", name, code, fate)
        return code, was_up

    def _outlive(self, engine: "subprocess.Popen[bytes]") -> int:
        """Wait for the engine's end; once it was told to stop, not for ever."""
        until_s: float | None = None
        while True:
            if self._stopping and until_s is None:
                engine.terminate()
                until_s = time.monotonic() + self._patience_s
            left_s = None if until_s is None else 0.0 if self._hurried else until_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                engine.kill()
                left_s = None
            code = self._next(left_s)
            if code is not None:
                return code

    def _next(self, within_s: float | None) -> int | None:
        """An engine's exit code, or None when the time is over or there is something to look at."""
        try:
            return self._events.get(timeout=within_s)
        except Empty:
            return None

    def _pause(self, pause_s: float) -> None:
        """Before the next start; `stop` ends it."""
        until_s = time.monotonic() + pause_s
        while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
            self._next(left_s)
