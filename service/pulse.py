"""The worker's line every ten seconds: what runs, what waits, how fast, how full. For people who have only the log.

It knows an engine's statistics and nothing else. While there is nothing to compute it says so once, and is silent.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from service.logs import fields
from service.metrics_work import StepStats, cache_use

BEAT_S = 10.0

logger = logging.getLogger(__name__)


class PulseStats(StepStats, Protocol):
    """What a line is made of."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def output_tokens_total(self) -> int: ...
    @property
    def preemptions_total(self) -> int: ...


class Pulse:
    """`stats` gives the latest statistics, None before the first step. The clock is monotonic seconds."""

    def __init__(self, stats: Callable[[], PulseStats | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._stats, self._clock = stats, clock
        self._told = (clock(), 0, 0, 0)
        self._was_busy = False

    async def beat_for_ever(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            self.beat()

    def beat(self) -> None:
        """Log a line over the time since the last one, if there was anything to compute in it or before it."""
        stats, now_s = self._stats(), self._clock()
        if stats is None:
            return
        before_s, prompt, output, preemptions = self._told
        totals = (stats.prompt_tokens_total, stats.output_tokens_total, stats.preemptions_total)
        self._told = (now_s, *totals)
        is_busy = bool(stats.num_running or stats.num_waiting) or totals != (prompt, output, preemptions)
        if not (is_busy or self._was_busy):
            return
        self._was_busy = is_busy
        seconds = max(now_s - before_s, 0.001)
        logger.info(
            "engine",
            extra=fields(
                running=stats.num_running,
                waiting=stats.num_waiting,
                prompt_tokens_per_s=round((totals[0] - prompt) / seconds, 1),
                output_tokens_per_s=round((totals[1] - output) / seconds, 1),
                preemptions=totals[2] - preemptions,
                cache=round(cache_use(stats), 3),
            ),
        )
