"""What a worker counts: its engine's steps, and what became of each request that it held.

The hot path stores a reference and fills two histograms; everything else is read at a scrape, from the statistics that
the engine keeps anyway. It knows no engine and no broker.
"""

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.request import FinishReason
from service.broker.base import Verdict
from service.metrics import Spread
from service.traces import Traces
from service.worker import ABANDONED, RELEASED, Report, Stay

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FATES = (*(reason.value for reason in FinishReason), Verdict.EXPIRED.value, Verdict.FENCED.value, RELEASED, ABANDONED)
# Of a fence nothing committed is lost, nor of what was given back: others go on with those ids.
WASTED = (FinishReason.CANCELLED.value, FinishReason.ERROR.value, Verdict.EXPIRED.value)

# name, attribute of the engine's statistics, help
COUNTERS = (
    ("prompt_tokens", "prompt_tokens_total", "Prompt tokens computed, recomputed ones included."),
    ("generated_tokens", "output_tokens_total", "Tokens drawn."),
    ("preemptions", "preemptions_total", "Sequences put back because the cache was full."),
    ("engine_steps", "steps_total", "Steps computed."),
    ("prefix_asked_tokens", "prefix_asked_total", "Prompt tokens looked for in the prefix cache."),
    ("prefix_found_tokens", "prefix_found_total", "Prompt tokens found there, and so not computed."),
)
GAUGES = (
    ("engine_sequences_running", "num_running", "Sequences in the engine's batch."),
    ("engine_sequences_waiting", "num_waiting", "Sequences that the engine holds and does not compute now."),
    ("cache_blocks", "num_blocks", "Blocks of the cache."),
    ("cache_free_blocks", "num_free_blocks", "Blocks of the cache that are free."),
)


class StepStats(Protocol):
    """What a step's report must tell beside the attributes above; the engine's own statistics do."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def last_rows(self) -> int: ...


Stats = TypeVar("Stats", bound=StepStats)


class WorkMetrics(Collector, Generic[Stats]):
    """Of one engine. `progress_age_s` is its worker's, once there is one; `claims` counts what was claimed again and
    taken over, where the queue outlives a worker. `traces` is told of each request that leaves."""

    def __init__(
        self,
        registry: CollectorRegistry,
        claims: Callable[[], tuple[int, int]] = lambda: (0, 0),
        traces: Traces | None = None,
    ) -> None:
        self.progress_age_s: Callable[[], float] = lambda: 0.0
        self.stats: Stats | None = None
        self.num_wasted = dict.fromkeys(WASTED, 0)
        self._fates = dict.fromkeys(FATES, 0)
        self._claims, self._traces = claims, traces
        self._step = Spread("step_seconds", "Duration of an engine step.", registry)
        self._step_tokens = Spread("step_tokens", "Tokens computed in an engine step.", registry, TOKENS)
        self._batch = Spread("batch_sequences", "Sequences in the batch, at each step.", registry, TOKENS)
        self._prefill = Spread("prefill_seconds", "From a worker's claim to the first token it drew.", registry)
        self._decode = Spread("decode_seconds", "From the first token that a worker drew to its last.", registry)
        registry.register(self)

    def on_step(self, report: Report[Stats]) -> None:
        """Take in one engine step. Cheap: called for every step, on the event loop."""
        self.stats = stats = report.stats
        if stats.last_rows:  # else it only took in requests or departures
            self._step.observe(report.step_s)
            self._step_tokens.observe(stats.last_rows)
            self._batch.observe(stats.num_running)

    def on_leave(self, stay: Stay) -> None:
        """A request has left the worker."""
        if self._traces is not None:
            self._traces.worked(
                stay.job.request, stay.claimed_s, stay.first_s, len(stay.job.so_far), stay.num_tokens, stay.fate
            )
        self._fates[stay.fate] += 1
        if stay.fate in WASTED:
            self.num_wasted[stay.fate] += stay.num_tokens
        if stay.first_s is not None:
            self._prefill.observe(stay.first_s - stay.claimed_s)
            self._decode.observe(stay.last_s - stay.first_s)

    def collect(self) -> Iterator[Metric]:
        """What the engine's statistics say now."""
        stats = self.stats
        for name, attribute, about in COUNTERS:
            yield CounterMetricFamily(f"millrace_{name}", about, getattr(stats, attribute, 0))
        for name, attribute, about in GAUGES:
            yield GaugeMetricFamily(f"millrace_{name}", about, getattr(stats, attribute, 0))
        yield GaugeMetricFamily("millrace_cache_use_ratio", "Share of the cache's blocks in use.", cache_use(stats))
        age_s = self.progress_age_s()
        yield GaugeMetricFamily("millrace_engine_progress_age_seconds", "Since the last step; 0 when idle.", age_s)
        yield _by("requests_left", "Sequences that left the worker, by how.", "fate", self._fates)
        yield _by("wasted_tokens", "Tokens drawn for sequences that nobody has the end of.", "fate", self.num_wasted)
        redelivered, taken_over = self._claims()
        yield CounterMetricFamily("millrace_redeliveries", "Claims of what was claimed before.", redelivered)
        yield CounterMetricFamily("millrace_take_overs", "Of those, with tokens of another worker.", taken_over)


def cache_use(stats: StepStats | None) -> float:
    """The share of the cache's blocks in use, 0 to 1."""
    return 1 - stats.num_free_blocks / stats.num_blocks if stats is not None and stats.num_blocks else 0.0


def _by(name: str, about: str, label: str, counts: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"millrace_{name}", about, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
