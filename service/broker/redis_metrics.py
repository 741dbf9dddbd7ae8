"""What a process sees of Redis: its own round trips, calls and errors, and what Redis says of its memory.

A collector without a registry: who makes the link hangs it into one. It knows no connection.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.metrics import Spread

# field of INFO, name, help
FACTS = (
    ("used_memory", "redis_memory_bytes", "Memory that Redis uses."),
    ("maxmemory", "redis_max_memory_bytes", "Memory that Redis may use; 0 is any."),
    ("connected_clients", "redis_clients", "Connections to Redis."),
    ("instantaneous_ops_per_sec", "redis_commands_per_second", "Commands that Redis does, those in functions too."),
)


class LinkMetrics(Collector):
    """Of one link. `away_s` tells for how long Redis has not answered."""

    def __init__(self, away_s: Callable[[], float]) -> None:
        self._away_s = away_s
        self._trips = Spread("redis_round_trip_seconds", "Of a batch of calls, answered or not.")
        self._calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._facts: Mapping[str, object] = {}

    def trip(self, names: Iterable[str], seconds: float) -> None:
        """A batch of calls went to Redis and came back."""
        self._trips.observe(seconds)
        self._calls.update(names)

    def failed(self, kind: str) -> None:
        """A batch was lost, or a call was answered with an error; `kind` is its class."""
        self._errors[kind] += 1

    def know(self, facts: Mapping[str, object]) -> None:
        """What INFO says; empty if it can't be asked."""
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """Counts since the start, and facts of the last `know`."""
        yield from self._trips.collect()
        calls = CounterMetricFamily("millrace_redis_calls", "Calls of functions, with repeats.", labels=["function"])
        for name, count in self._calls.items():
            calls.add_metric([name], count)
        errors = CounterMetricFamily("millrace_redis_errors", "Batches lost and calls refused.", labels=["kind"])
        for kind, count in (self._errors or {"ConnectionError": 0}).items():
            errors.add_metric([kind], count)
        yield calls
        yield errors
        yield GaugeMetricFamily("millrace_redis_away_seconds", "How long Redis has not answered.", self._away_s())
        for field, name, about in FACTS:
            value = self._facts.get(field)
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"millrace_{name}", about, value)
