"""What a worker counts, from reports and departures."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from model.request import Request
from service.broker.base import Job
from service.metrics_work import WorkMetrics, cache_use
from service.worker import RELEASED, Report, Stay


@dataclass(frozen=True)
class Stats:
    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 10
    num_free_blocks: int = 10
    preemptions_total: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    last_rows: int = 0
    prefix_asked_total: int = 0
    prefix_found_total: int = 0


class Watched:
    """Metrics over a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.work: WorkMetrics[Stats] = WorkMetrics(self.registry, lambda: (3, 2))

    def step(self, stats: Stats, step_s: float = 0.01) -> None:
        self.work.on_step(Report([], step_s, stats, room=1, num_jobs=0))

    def leave(self, fate: str, first_s: float | None, last_s: float = 0.0, num_tokens: int = 0) -> None:
        self.work.on_leave(Stay(Job(Request("a", (1,))), 1, 10.0, first_s, last_s, num_tokens, fate))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"millrace_{name}", labels)


def test_counters_are_the_engines_own() -> None:
    it = Watched()
    assert it.value("generated_tokens_total") == 0
    it.step(Stats(num_free_blocks=4, prompt_tokens_total=7, output_tokens_total=1, last_rows=8, num_running=2))
    it.step(
        Stats(
            num_free_blocks=5, prompt_tokens_total=7, output_tokens_total=3, preemptions_total=1, prefix_found_total=4
        )
    )
    assert (it.value("prompt_tokens_total"), it.value("generated_tokens_total")) == (7, 3)
    assert (it.value("preemptions_total"), it.value("cache_use_ratio")) == (1, 0.5)
    assert it.value("prefix_found_tokens_total") == 4
    # The second computed nothing: it only told what had become free.
    assert (it.value("step_seconds_count"), it.value("step_tokens_sum"), it.value("batch_sequences_sum")) == (1, 8, 2)


def test_who_leaves_tells_what_it_took_and_what_was_wasted() -> None:
    it = Watched()
    it.leave("stop", first_s=10.5, last_s=12.5, num_tokens=5)
    it.leave("cancelled", first_s=11.0, last_s=11.0, num_tokens=1)
    it.leave("expired", first_s=None)
    it.leave(RELEASED, first_s=11.0, last_s=12.0, num_tokens=9)  # others go on with those
    it.leave("fenced", first_s=None)
    assert (it.value("prefill_seconds_count"), it.value("prefill_seconds_sum")) == (3, 2.5)
    assert it.value("decode_seconds_sum") == 3.0
    assert it.value("wasted_tokens_total", fate="cancelled") == 1
    assert [it.value("requests_left_total", fate=fate) for fate in ("stop", "expired", "fenced", "error")] == [
        1,
        1,
        1,
        0,
    ]


def test_claims_progress_and_an_empty_cache_are_asked_at_the_scrape() -> None:
    it = Watched()
    it.work.progress_age_s = lambda: 4.0
    assert (it.value("redeliveries_total"), it.value("take_overs_total")) == (3, 2)
    assert it.value("engine_progress_age_seconds") == 4
    assert cache_use(None) == cache_use(Stats(num_blocks=0)) == 0
