"""Every metric, declared once, in a registry of its own: a process may hold several (tests do).

The HTTP half keeps the books of requests through `Book`, the worker tells of its steps, and a scrape asks for the
queue. A request here is one generated sequence: the choices of a client's request count one by one. In the books,
accepted = the sum of ended over all outcomes + in flight, at any instant. A sequence that goes on without the process
that admitted it, or without a reader, has the outcome `handed_over` there; whoever reads it later does not count it
again.

Intervals are between monotonic stamps of one process, but for the time in the queue, which the broker tells. TTFT and
the whole duration begin when the request's body is in.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from model.request import FinishReason

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
HANDED_OVER = "handed_over"  # an outcome beside the finish reasons
OUTCOMES = (*(reason.value for reason in FinishReason), HANDED_OVER)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class StepStats(Protocol):
    """What a step's report must tell; the engine's own statistics do."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def preemptions_total(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def output_tokens_total(self) -> int: ...
    @property
    def last_rows(self) -> int: ...
    @property
    def prefix_asked_total(self) -> int: ...
    @property
    def prefix_found_total(self) -> int: ...


class Metrics:
    """The metrics of one process; `version` is told by `millrace_build_info`."""

    def __init__(self, version: str = "0") -> None:
        self.registry = CollectorRegistry()
        counter, gauge, seconds = self._counter, self._gauge, self._seconds
        self.accepted = counter("requests_accepted", "Sequences admitted to the queue.")
        ended = Counter(
            "millrace_requests_ended", "Sequences that ended, by outcome.", ["outcome"], registry=self.registry
        )
        self.ended = {outcome: ended.labels(outcome=outcome) for outcome in OUTCOMES}
        self.resumed = counter("streams_resumed", "Readers of requests that were submitted before.")
        self._refused = Counter(
            "millrace_requests_refused", "Client requests answered with an error.", ["reason"], registry=self.registry
        )
        self.in_flight = gauge("requests_in_flight", "Sequences accepted and not ended.")
        self._running = gauge("requests_running", "Sequences held by a worker.")
        self._waiting = gauge("requests_waiting", "Sequences waiting in the queue.")
        self.queue = seconds("queue_seconds", "From submission to the first claim by a worker.")
        self.ttft = seconds("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.inter_token = Spread("inter_token_seconds", "Between two tokens of a sequence.", self.registry)
        self.duration = seconds("request_seconds", "From a request's arrival to its end.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed, recomputed ones included.")
        self._generated_tokens = counter("generated_tokens", "Tokens drawn.")
        self._cache_use = gauge("cache_use_ratio", "Share of the cache's blocks in use.")
        self._preemptions = counter("preemptions", "Sequences put back because the cache was full.")
        self._prefix_asked = counter("prefix_asked_tokens", "Prompt tokens looked for in the prefix cache.")
        self._prefix_found = counter("prefix_found_tokens", "Prompt tokens found there, and so not computed.")
        self._step = seconds("step_seconds", "Duration of an engine step.")
        self._step_tokens = Histogram(
            "millrace_step_tokens", "Tokens computed in an engine step.", buckets=TOKENS, registry=self.registry
        )
        self._told = (0, 0, 0, 0, 0)  # what the cumulative counts of the engine were at the last step
        Info("millrace_build", "What is running.", registry=self.registry).info({"version": version})

    def refused(self, reason: str) -> None:
        """A client's request was answered with an error; `reason` is the code of the error tree."""
        self._refused.labels(reason=reason).inc()

    def on_step(self, stats: StepStats, step_s: float) -> None:
        """Take in one engine step. Cheap: called for every step, on the event loop."""
        now = (
            stats.prompt_tokens_total,
            stats.output_tokens_total,
            stats.preemptions_total,
            stats.prefix_asked_total,
            stats.prefix_found_total,
        )
        counters = (
            self._prompt_tokens, self._generated_tokens, self._preemptions, self._prefix_asked, self._prefix_found
        )  # fmt: skip
        for counter, total, before in zip(counters, now, self._told, strict=True):
            counter.inc(total - before)
        self._told = now
        self._cache_use.set(1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0)
        if stats.last_rows:  # else it only took in requests or departures
            self._step.observe(step_s)
            self._step_tokens.observe(stats.last_rows)

    def on_load(self, num_waiting: int, num_running: int) -> None:
        """What the broker says of its queue, asked at every scrape."""
        self._waiting.set(num_waiting)
        self._running.set(num_running)

    def exposition(self) -> bytes:
        """All of it in the Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"millrace_{name}", about, registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"millrace_{name}", about, registry=self.registry)

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(f"millrace_{name}", about, buckets=SECONDS, registry=self.registry)


class Spread(Collector):
    """A histogram of seconds that one thread fills, at a fifth of the library's cost: it is the one for every token."""

    def __init__(self, name: str, about: str, registry: CollectorRegistry) -> None:
        self._name, self._about = f"millrace_{name}", about
        self._counts, self._sum_s = [0] * (len(SECONDS) + 1), 0.0
        registry.register(self)

    def observe(self, seconds: float, times: int = 1) -> None:
        """The same value so many times."""
        self._counts[bisect_left(SECONDS, seconds)] += times
        self._sum_s += seconds * times

    def collect(self) -> Iterator[Metric]:
        """As the library's own are told."""
        bounds = map(floatToGoString, (*SECONDS, math.inf))
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._about, buckets, self._sum_s)


class Book:
    """The account of one sequence: in flight from `begin` until `end`, which counts once only. One that never began
    belongs to a sequence that was submitted elsewhere or before, and counts nothing."""

    __slots__ = ("_arrived_s", "_has_token", "_last_s", "_metrics", "_open")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = self._last_s = 0.0
        self._open = self._has_token = False

    def begin(self, arrived_s: float) -> None:
        """The broker has taken it; its request arrived then."""
        self._arrived_s = self._last_s = arrived_s
        self._open = True
        self._metrics.accepted.inc()
        self._metrics.in_flight.inc()

    def tokens(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` >= 1 came at once; after the first, the time since the last ones is shared among them."""
        if not self._open:
            return
        interval_s, self._last_s = now_s - self._last_s, now_s
        if not self._has_token:
            self._has_token = True
            self._metrics.ttft.observe(interval_s)
            return
        self._metrics.inter_token.observe(interval_s / num_tokens, num_tokens)

    def end(self, outcome: str, now_s: float, queue_s: float | None = None) -> None:
        """Close the account, whoever says so first. `outcome` is one of `OUTCOMES`."""
        if not self._open:
            return
        self._open = False
        self._metrics.in_flight.dec()
        self._metrics.ended[outcome].inc()
        if outcome != HANDED_OVER:  # that one has not ended
            self._metrics.duration.observe(now_s - self._arrived_s)
        if queue_s is not None:
            self._metrics.queue.observe(queue_s)
