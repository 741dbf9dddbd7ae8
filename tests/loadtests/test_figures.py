"""From records to figures, by hand; the SLO; when arrivals come."""

import math
import random

import pytest

from loadtests.load.figures import Slo, Spread, levels, summary, warmed_up
from loadtests.load.records import LEFT, OK, Record
from loadtests.load.schedule import dealt, poisson, replayed, share_at
from loadtests.load.traces import Arrival


def record(
    due_s: float = 0.0, ttft_s: float = 0.1, gap_s: float = 0.01, outcome: str = OK, late_s: float = 0.0
) -> Record:
    """Three tokens."""
    e2e_s = ttft_s + 2 * gap_s
    return Record("chat", due_s, due_s + late_s, ttft_s, e2e_s, [gap_s] * 2, 10, 3, outcome)


def test_a_wait_counts_from_when_the_request_was_due() -> None:
    told = summary([record(late_s=0.4)])
    assert told.ttft.mean == pytest.approx(0.5) and told.late.mean == pytest.approx(0.4)
    assert told.span_s == pytest.approx(0.52) and told.tokens_per_s == pytest.approx(3 / 0.52)


def test_goodput_counts_what_was_promised_only() -> None:
    slow, broken, left = record(ttft_s=2.0), record(outcome="status 500"), record(outcome=LEFT)
    told = summary([record(), slow, broken, left], Slo())
    assert told.good_per_s == pytest.approx(2 / 2.02)  # the first one and the one that was left
    assert told.errors == {"status 500": 1} and told.error_share == 0.25


@pytest.mark.parametrize(
    ("records", "broken"),
    [
        ([record()] * 200, ""),
        ([record()] * 197 + [record(ttft_s=3)] * 3, "TTFT p99 3000 ms"),
        ([record()] * 97 + [record(gap_s=0.3)] * 3, "inter-token p99 300 ms"),
        ([record()] * 90 + [record(outcome="status 429")] * 10, "errors 10.0%"),
        ([], "no request"),
    ],
)
def test_a_promise_is_kept_or_broken(records: list[Record], broken: str) -> None:
    lines = Slo.parse("ttft:1000,itl:100,errors:0.01").broken(summary(records))
    assert (broken in lines[0]) if broken else not lines


def test_an_slo_names_what_it_does_not_know() -> None:
    assert Slo.parse("itl:50") == Slo(itl_s=0.05)
    with pytest.raises(ValueError, match="latency"):
        Slo.parse("latency:5")


def test_a_run_is_cut_by_when_requests_were_due() -> None:
    parts = levels([record(at) for at in (100, 104.8, 104.95, 105, 109.7)], 2, 10.0, Slo())
    assert [part.num for part in parts] == [3, 2] and parts[0].offered_per_s == 0.6
    assert [part.num_tokens for part in parts] == [6, 9]  # where they came
    assert warmed_up([record(at) for at in (100, 101, 109)], 0.5, 10.0, Slo()).num_tokens == 6


def test_of_no_sample_nothing_is_known() -> None:
    assert math.isnan(Spread.of([]).quantiles[0.99])


def test_poisson_arrivals_have_the_rate_and_the_shape() -> None:
    flat = list(poisson(50, 100, lambda at: 1.0, random.Random(1)))
    assert 4700 < len(flat) < 5300 and flat == sorted(flat) and flat[-1] < 100
    ramp = list(poisson(50, 100, lambda at: share_at("ramp", at, 4), random.Random(1)))
    firsts = sum(at_s < 25 for at_s in ramp)
    assert 250 < firsts < 375 and len(ramp) < 0.7 * len(flat)


def test_shapes() -> None:
    assert [share_at("ramp", at, 4) for at in (0, 0.26, 0.5, 0.99, 1)] == [0.25, 0.5, 0.75, 1, 1]
    assert [share_at("soak", at) for at in (0, 0.05, 0.5, 0.95)] == [0.02, 0.5, 1.0, pytest.approx(0.5)]


def test_a_trace_is_dealt_out_and_played_faster() -> None:
    trace = [Arrival(at, 1, 1) for at in range(10)]
    played = list(replayed(trace, 2.0, run_s=3.0))
    assert [one.at_s for one in played] == [0, 0.5, 1, 1.5, 2, 2.5]
    first, second = (list(dealt(played, index, 2)) for index in range(2))
    assert first == played[::2] and second == played[1::2]
