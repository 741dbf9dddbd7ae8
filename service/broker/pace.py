"""How fast requests end, and so how long a refused client should wait. It knows no clock and no queue."""

import math

RETRY_AFTER_S = (1, 60)  # the range of what a refused client is told
INTERVAL_WEIGHT = 0.1  # of the latest interval between two ends, in the moving average


class Pace:
    """The moving mean of the time between two ends while there is work: its inverse is the throughput."""

    def __init__(self) -> None:
        self._last_s = 0.0  # the last end, or when work began after a pause
        self._interval_s: float | None = None

    def begin(self, now_s: float) -> None:
        """Work comes after a pause, which does not count."""
        self._last_s = now_s

    def end(self, now_s: float) -> None:
        """A request that ran has ended."""
        interval_s = max(0.0, now_s - self._last_s)
        mean_s = interval_s if self._interval_s is None else self._interval_s
        self._interval_s = mean_s + INTERVAL_WEIGHT * (interval_s - mean_s)
        self._last_s = now_s

    def retry_after_s(self, num_waiting: int) -> int:
        """Until what waits now will have been served."""
        low, high = RETRY_AFTER_S
        return min(high, max(low, math.ceil(num_waiting * (self._interval_s or 0.0))))
