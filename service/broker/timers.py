"""Named timers of one thing, so that none outlives it. It knows not what they are for.

Delays, not instants: a step of the wall clock moves no deadline that is already running.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> object: ...


class CallLater(Protocol):
    """`loop.call_later`, or a test's."""

    def __call__(self, delay_s: float, callback: Callable[[], object], /) -> Timer: ...


class Timers:
    """At most one timer of each name. Without a `call_later` they are the running loop's."""

    __slots__ = ("_call_later", "_running")

    def __init__(self, call_later: CallLater | None) -> None:
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._running: dict[str, Timer] = {}

    def start(self, name: str, delay_s: float, callback: Callable[[], object]) -> None:
        """Call back after `delay_s`, at once if that is negative; a timer of that name is stopped."""
        self.stop(name)
        self._running[name] = self._call_later(max(0.0, delay_s), callback)

    def stop(self, name: str) -> None:
        """Stop the one of that name, if there is one."""
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Stop every one."""
        for name in list(self._running):
            self.stop(name)
