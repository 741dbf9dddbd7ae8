"""The books, the histograms, and the names."""

import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from model.request import FinishReason, Request
from service.metrics import HANDED_OVER, MOST_TENANTS, OTHERS, OUTCOMES, SECONDS, Book, Metrics, Tenants


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


def test_a_timeout_tells_which_limit_it_was() -> None:
    metrics = Metrics()
    for limit in ("timeout_s", "queue_timeout_s", None):
        book = Book(metrics)
        book.begin(arrived_s=0)
        book.end(FinishReason.TIMEOUT, now_s=1, limit=limit)
    assert value(metrics, "requests_expired_total", limit="queue_timeout_s") == 1
    assert value(metrics, "requests_ended_total", outcome="timeout") == 3


def test_tenants_have_their_load_and_the_labels_are_bounded() -> None:
    metrics = Metrics()
    for i in range(MOST_TENANTS + 5):
        book = Book(metrics)
        book.begin(0, Request("a", (1, 2, 3), tenant=f"t{i}"))
        book.tokens(4, 1)
        book.end(FinishReason.STOP, 1, queue_s=0.5)
    told = [value(metrics, f"tenant_{name}_total", tenant="t7") for name, _ in Tenants.NAMES]
    assert (told, value(metrics, "tenant_requests_in_flight", tenant="t7")) == ([1, 3, 4, 0.5], 0)
    assert value(metrics, "tenant_requests_accepted_total", tenant=OTHERS) == 5


def test_a_trace_is_an_exemplar_for_who_reads_openmetrics() -> None:
    metrics, trace = Metrics(), "0af7651916cd43dd8448eb211c80319c"
    for traceparent in ("", f"00-{trace}-b7ad6b7169203331-01"):
        book = Book(metrics)
        book.begin(0, Request("a", (1,), traceparent=traceparent))
        book.tokens(1, 0.5)
    text, media_type = metrics.exposition("application/openmetrics-text; version=1.0.0,text/plain;q=0.1")
    assert media_type.startswith("application/openmetrics-text") and text.endswith(b"# EOF\n")
    assert f'le="0.5"}} 2.0 # {{trace_id="{trace}"}} 0.5' in text.decode()
    assert b"trace_id" not in metrics.exposition("text/plain")[0]


def test_the_queues_books_are_told_while_it_answers() -> None:
    metrics = Metrics()
    assert value(metrics, "requests_waiting") is None
    metrics.line.see(waiting=2, running=1, oldest_wait_s=1.5, accepted=10, ended={"stop": 7})
    assert value(metrics, "queue_accepted_total") == 10 == 7 + 2 + 1
    assert [value(metrics, "queue_ended_total", outcome=each) for each in ("stop", "error")] == [7, 0]
    assert value(metrics, "oldest_wait_seconds") == 1.5
    metrics.line.lose()
    assert value(metrics, "requests_waiting") is None


def test_a_quantile_of_a_histogram_is_near_the_true_one() -> None:
    """Buckets are a quarter apart at most, from 1 ms to 10 min."""
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 600)
    assert all(1 < above / below <= 1.29 for below, above in pairwise(SECONDS))


def test_two_registries_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.refused("overloaded")
    assert value(other, "requests_refused_total", reason="overloaded") is None


def test_names_and_helps_are_as_prometheus_wants_them() -> None:
    text = Metrics("1.2").exposition()[0].decode()
    kinds = dict(re.findall(r"# TYPE (\S+) (\S+)", text))
    helps = dict(re.findall(r"# HELP (\S+) (.+)", text))
    assert 'millrace_build_info{version="1.2"} 1.0' in text
    for name, kind in kinds.items():
        assert re.fullmatch(r"millrace_[a-z_]+", name)
        assert helps[name]
        assert (kind == "counter") == name.endswith("_total")
        assert kind != "histogram" or name.endswith(("_seconds", "_tokens"))
