"""What the HTTP half counts, in a registry of its own: a process may hold several (tests do). The worker's half is in
`metrics_work.py`, the link's to Redis in `broker/redis_metrics.py`; both are hung into this registry.

The books of requests are kept through `Book`, and a scrape asks for the queue. A request here is one generated
sequence: the choices of a client's request count one by one. In the books,
accepted = the sum of ended over all outcomes + in flight, at any instant. A sequence that goes on without the process
that admitted it, or without a reader, has the outcome `handed_over` there; whoever reads it later does not count it
again.

Intervals are between monotonic stamps of one process, but for the time in the queue, which the broker tells. TTFT and
the whole duration begin when the request's body is in.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics
from prometheus_client.registry import Collector

from model.request import FinishReason, Request

TENTHS = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)  # of a decade: a quantile read from such buckets is off by 5 %
SECONDS = (*(round(x * 10**e, 6) for e in range(-3, 2) for x in TENTHS), 100, 125, 160, 200, 250, 320, 400, 500, 600)
HANDED_OVER = "handed_over"  # an outcome beside the finish reasons
OUTCOMES = (*(reason.value for reason in FinishReason), HANDED_OVER)
LIMITS = ("timeout_s", "queue_timeout_s")  # what a timeout may have run into
MOST_TENANTS, OTHERS = 100, "others"  # labels: past so many tenants, those that come later share one


class Base:
    """A registry, and what every process tells; `version` is told by `millrace_build_info`."""

    def __init__(self, version: str = "0") -> None:
        self.registry = CollectorRegistry()
        self.draining = self.gauge("draining", "1 from the signal to stop on.")
        Info("millrace_build", "What is running.", registry=self.registry).info({"version": version})

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All of it, and its media type: OpenMetrics, which has the exemplars, for who accepts that, else the text
        format of Prometheus."""
        if "application/openmetrics-text" in accept:
            return as_openmetrics(self.registry), OPENMETRICS  # type: ignore[no-untyped-call]
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def gauge(self, name: str, about: str, value: Callable[[], float] | None = None) -> Gauge:
        """A gauge of this registry, told by `value` at each scrape if that is given."""
        made = Gauge(f"millrace_{name}", about, registry=self.registry)
        if value is not None:
            made.set_function(value)
        return made

    def seconds(self, name: str, about: str) -> "Spread":
        """A histogram of seconds in this registry."""
        return Spread(name, about, self.registry)

    def counter(self, name: str, about: str) -> Counter:
        """A counter in this registry."""
        return Counter(f"millrace_{name}", about, registry=self.registry)

    def counters(self, name: str, about: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        """Counters that differ in one label, by its value."""
        made = Counter(f"millrace_{name}", about, [label], registry=self.registry)
        return {value: made.labels(value) for value in values}


class Metrics(Base):
    """The metrics of a process that serves clients."""

    def __init__(self, version: str = "0") -> None:
        super().__init__(version)
        counter, gauge, seconds = self.counter, self.gauge, self.seconds
        self.accepted = counter("requests_accepted", "Sequences admitted to the queue.")
        self.ended = self.counters("requests_ended", "Sequences that ended, by outcome.", "outcome", OUTCOMES)
        self.expired = self.counters("requests_expired", "Sequences out of time, by the limit.", "limit", LIMITS)
        self.resumed = counter("streams_resumed", "Readers of requests that were submitted before.")
        self._refused = Counter(
            "millrace_requests_refused", "Client requests answered with an error.", ["reason"], registry=self.registry
        )
        self.in_flight = gauge("requests_in_flight", "Sequences accepted and not ended.")
        self.queue = seconds("queue_seconds", "From submission to the first claim by a worker.")
        self.ttft = seconds("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.inter_token = seconds("inter_token_seconds", "Between two tokens of a sequence.")
        self.duration = seconds("request_seconds", "From a request's arrival to its end.")
        self.tenants = Tenants(self.registry)
        self.line = Line(self.registry)
        self.ready = gauge("ready", "1 where new requests are taken.")

    def refused(self, reason: str) -> None:
        """A client's request was answered with an error; `reason` is the code of the error tree."""
        self._refused.labels(reason=reason).inc()


class Spread(Collector):
    """A histogram that one thread fills, at a fifth of the library's cost: there is one for every token. Seconds, if
    `bounds` are not told. Of each bucket the last value with a trace is kept, with the trace's id."""

    def __init__(
        self,
        name: str,
        about: str,
        registry: CollectorRegistry | None = None,
        bounds: Sequence[float] = SECONDS,
    ) -> None:
        self._name, self._about, self._bounds = f"millrace_{name}", about, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._exemplars: dict[int, Exemplar] = {}
        if registry is not None:
            registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """The same value so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def observe_traced(self, value: float, trace_id: str) -> None:
        """One value, of this trace; "" is none."""
        self.observe(value)
        if trace_id:
            self._exemplars[bisect_left(self._bounds, value)] = Exemplar({"trace_id": trace_id}, value, time.time())

    def collect(self) -> Iterator[Metric]:
        """As the library's own are told."""
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for i, (bound, count) in enumerate(zip((*self._bounds, math.inf), accumulate(self._counts), strict=True)):
            told, exemplar = "+Inf" if bound == math.inf else str(float(bound)), self._exemplars.get(i)
            buckets.append((told, count, exemplar) if exemplar else (told, count))
        family = HistogramMetricFamily(self._name, self._about)
        family.add_metric([], buckets, self._sum)
        yield family


class Tenants(Collector):
    """Who brings the load: sequences and tokens of each tenant. The labels are bounded."""

    NAMES = (
        ("requests_accepted", "Sequences admitted to the queue, by tenant."),
        ("prompt_tokens", "Tokens of the prompts of ended sequences, by tenant."),
        ("answer_tokens", "Tokens that were read of ended sequences, by tenant."),
        ("queue_seconds", "Seconds that ended sequences had waited, by tenant."),
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sums: dict[str, list[float]] = {}
        registry.register(self)

    def of(self, tenant: str) -> list[float]:
        """Its sums, in the order of `NAMES` and then how many are in flight, to be added to."""
        known = self._sums.get(tenant)
        if known is None:
            label = tenant if len(self._sums) < MOST_TENANTS else OTHERS
            known = self._sums.setdefault(label, [0.0] * (len(self.NAMES) + 1))
        return known

    def collect(self) -> Iterator[Metric]:
        """One sample of each kind for each tenant."""
        for i, (name, about) in enumerate(self.NAMES):
            family = CounterMetricFamily(f"millrace_tenant_{name}", about, labels=["tenant"])
            for tenant, sums in self._sums.items():
                family.add_metric([tenant], sums[i])
            yield family
        gauge = GaugeMetricFamily("millrace_tenant_requests_in_flight", "Sequences not ended.", labels=["tenant"])
        for tenant, sums in self._sums.items():
            gauge.add_metric([tenant], sums[-1])
        yield gauge


class Line(Collector):
    """The queue as the broker has it, all of one instant: accepted = the sum of ended + waiting + running, whichever
    processes have died. Nothing is told before the first `see`, nor after the queue could not be asked."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._told: list[Metric] = []
        registry.register(self)

    def see(self, waiting: int, running: int, oldest_wait_s: float, accepted: int, ended: Mapping[str, int]) -> None:
        """What a scrape has just been told."""
        family = CounterMetricFamily("millrace_queue_ended", "Sequences the queue saw end.", labels=["outcome"])
        for outcome in FinishReason:
            family.add_metric([outcome], ended.get(outcome, 0))
        self._told = [
            GaugeMetricFamily("millrace_requests_waiting", "Sequences waiting in the queue.", waiting),
            GaugeMetricFamily("millrace_requests_running", "Sequences held by workers.", running),
            GaugeMetricFamily("millrace_oldest_wait_seconds", "How long the oldest waits by now.", oldest_wait_s),
            CounterMetricFamily("millrace_queue_accepted", "Sequences that came into the queue.", accepted),
            family,
        ]

    def lose(self) -> None:
        """The queue does not answer: what it said before is no longer told."""
        self._told = []

    def collect(self) -> Iterator[Metric]:
        """What was seen last."""
        yield from self._told


class Book:
    """The account of one sequence: in flight from `begin` until `end`, which counts once only. One that never began
    belongs to a sequence that was submitted elsewhere or before, and counts nothing."""

    __slots__ = ("_arrived_s", "_last_s", "_metrics", "_num_tokens", "_open", "_request", "first_s")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = self._last_s = 0.0
        self._num_tokens = 0
        self._open = False
        self._request: Request | None = None
        self.first_s: float | None = None  # when its first token came

    def begin(self, arrived_s: float, request: Request | None = None) -> None:
        """The broker has taken it; its request arrived then."""
        self._arrived_s = self._last_s = arrived_s
        self._open, self._request = True, request
        self._metrics.accepted.inc()
        self._metrics.in_flight.inc()
        if request is not None:
            sums = self._metrics.tenants.of(request.tenant)
            sums[0] += 1
            sums[-1] += 1

    def tokens(self, num_tokens: int, now_s: float) -> None:
        """`num_tokens` >= 1 came at once; after the first, the time since the last ones is shared among them."""
        if not self._open:
            return
        interval_s, self._last_s = now_s - self._last_s, now_s
        self._num_tokens += num_tokens
        if self.first_s is None:
            self.first_s = now_s
            self._metrics.ttft.observe_traced(interval_s, self._trace_id())
            return
        self._metrics.inter_token.observe(interval_s / num_tokens, num_tokens)

    def end(self, outcome: str, now_s: float, queue_s: float | None = None, limit: str | int | None = None) -> None:
        """Close the account, whoever says so first. `outcome` is one of `OUTCOMES`; `limit` is which one a timeout ran
        into."""
        if not self._open:
            return
        self._open = False
        self._metrics.in_flight.dec()
        self._metrics.ended[outcome].inc()
        if outcome == FinishReason.TIMEOUT and limit in self._metrics.expired:
            self._metrics.expired[str(limit)].inc()
        if outcome != HANDED_OVER:  # that one has not ended
            self._metrics.duration.observe_traced(now_s - self._arrived_s, self._trace_id())
        if queue_s is not None:
            self._metrics.queue.observe(queue_s)
        if self._request is not None:
            sums = self._metrics.tenants.of(self._request.tenant)
            sums[1] += len(self._request.asked_ids)
            sums[2] += self._num_tokens
            sums[3] += queue_s or 0.0
            sums[-1] -= 1

    def _trace_id(self) -> str:
        """The trace's id as W3C Trace Context has it: between the first two dashes."""
        return self._request.traceparent[3:35] if self._request is not None else ""
