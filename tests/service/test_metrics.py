"""The books, the histograms, and the names."""

import re
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from model.request import FinishReason
from service.metrics import HANDED_OVER, OUTCOMES, Book, Metrics


@dataclass(frozen=True)
class Stats:
    num_blocks: int = 10
    num_free_blocks: int = 10
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    last_rows: int = 0
    prefix_asked_total: int = 0
    prefix_found_total: int = 0


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"millrace_{name}", labels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(OUTCOMES), max_size=3)))
def test_the_books_balance_however_often_an_end_is_told(ends: list[list[str]]) -> None:
    metrics = Metrics()
    for outcomes in ends:
        book = Book(metrics)
        book.begin(arrived_s=0)
        for outcome in outcomes:
            book.end(outcome, now_s=1)
    ended = sum(value(metrics, "requests_ended_total", outcome=outcome) or 0 for outcome in OUTCOMES)
    assert value(metrics, "requests_accepted_total") == len(ends)
    assert ended == sum(map(bool, ends)) == len(ends) - (value(metrics, "requests_in_flight") or 0)


def test_a_sequence_leaves_its_durations() -> None:
    metrics = Metrics()
    book = Book(metrics)
    book.begin(arrived_s=10)
    book.tokens(1, now_s=12)
    book.tokens(4, now_s=14)
    book.end(FinishReason.STOP, now_s=15, queue_s=0.5)
    assert value(metrics, "time_to_first_token_seconds_sum") == 2
    assert value(metrics, "inter_token_seconds_count") == 4
    assert value(metrics, "inter_token_seconds_sum") == 2
    assert (value(metrics, "request_seconds_sum"), value(metrics, "queue_seconds_sum")) == (5, 0.5)


def test_a_book_that_never_began_counts_nothing() -> None:
    metrics = Metrics()
    book = Book(metrics)
    book.tokens(3, now_s=12)
    book.tokens(3, now_s=13)
    book.end(FinishReason.STOP, now_s=14, queue_s=0.5)
    names = ("time_to_first_token_seconds", "inter_token_seconds", "queue_seconds", "request_seconds")
    assert [value(metrics, f"{name}_count") for name in names] == [0] * 4
    assert value(metrics, "requests_ended_total", outcome="stop") == 0


def test_what_was_handed_over_has_an_outcome_but_no_duration() -> None:
    metrics = Metrics()
    book = Book(metrics)
    book.begin(arrived_s=0)
    book.end(HANDED_OVER, now_s=9)
    assert value(metrics, "requests_ended_total", outcome="handed_over") == 1
    assert (value(metrics, "requests_in_flight"), value(metrics, "request_seconds_count")) == (0, 0)


def test_steps_add_what_the_engine_counted_since_the_last_one() -> None:
    metrics = Metrics()
    metrics.on_step(Stats(num_free_blocks=4, prompt_tokens_total=7, output_tokens_total=1, last_rows=8), 0.01)
    metrics.on_step(Stats(num_free_blocks=5, prompt_tokens_total=7, output_tokens_total=3, preemptions_total=1), 0.01)
    metrics.on_step(Stats(10, 5, 1, 7, 3, prefix_asked_total=9, prefix_found_total=4), 0.01)
    assert (value(metrics, "prefix_asked_tokens_total"), value(metrics, "prefix_found_tokens_total")) == (9, 4)
    assert (value(metrics, "prompt_tokens_total"), value(metrics, "generated_tokens_total")) == (7, 3)
    assert (value(metrics, "preemptions_total"), value(metrics, "cache_use_ratio")) == (1, 0.5)
    # The second computed nothing: it only told what had become free.
    assert (value(metrics, "step_seconds_count"), value(metrics, "step_tokens_sum")) == (1, 8)


def test_two_registries_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.refused("overloaded")
    assert value(other, "requests_refused_total", reason="overloaded") is None


def test_names_and_helps_are_as_prometheus_wants_them() -> None:
    text = Metrics("1.2").exposition().decode()
    kinds = dict(re.findall(r"# TYPE (\S+) (\S+)", text))
    helps = dict(re.findall(r"# HELP (\S+) (.+)", text))
    assert 'millrace_build_info{version="1.2"} 1.0' in text
    for name, kind in kinds.items():
        assert re.fullmatch(r"millrace_[a-z_]+", name)
        assert helps[name]
        assert (kind == "counter") == name.endswith("_total")
        assert kind != "histogram" or name.endswith(("_seconds", "_tokens"))
