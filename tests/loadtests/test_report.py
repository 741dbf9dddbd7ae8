"""The load test from end to end against a tiny server: what the server says beside the client, the report, the exit
code, the search for the knee."""

import json
import re
from pathlib import Path

import pytest

from loadtests.load.__main__ import knee, main
from loadtests.load.scrape import Histogram, Watch, histogram, parsed
from tests.test_serve import Served

SCRAPED = """# TYPE wait histogram
wait_seconds_bucket{le="0.1"} 2.0
wait_seconds_bucket{le="1.0"} 10.0
wait_seconds_bucket{le="+Inf"} 10.0
wait_seconds_sum 4.0
other_total{outcome="ok"} 3.0
"""
PNG = b"\x89PNG\r\n"


def test_a_histogram_is_read_and_its_quantiles_are_prometheus() -> None:
    found = histogram(parsed(SCRAPED), "wait_seconds")
    assert found == Histogram((0.1, 1.0, float("inf")), (2.0, 8.0, 0.0), 4.0)
    assert found.mean == 0.4 and found.quantile(0.6) == pytest.approx(0.1 + 0.9 * 4 / 8)
    assert found.since(found).num == 0 and parsed(SCRAPED)['other_total{outcome="ok"}'] == 3


def test_a_clients_values_go_into_the_same_buckets() -> None:
    same = histogram(parsed(SCRAPED), "wait_seconds").refilled([0.05, 0.1, 0.5, 7.0])
    assert same.counts == (2.0, 1.0, 1.0) and same.total == 7.65
    assert same.quantile(0.99) == 1.0  # of the last bucket only its lower bound is known


@pytest.mark.parametrize(("capacity", "found"), [(7.0, 6.75), (0.5, None), (1e9, 2 * 1.5**11)])
def test_the_knee_is_found_from_below(capacity: float, found: float | None) -> None:
    asked: list[float] = []

    def keeps(rate: float) -> bool:
        asked.append(rate)
        return rate <= capacity

    told = knee(keeps, 2.0, halvings=4)
    assert told == pytest.approx(found, rel=0.05) if found else told is None
    assert sorted(asked[:3]) == asked[:3]


def report(folder: Path) -> tuple[str, dict[str, object]]:
    return (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())


def test_a_run_becomes_a_report_that_needs_nothing_beside_it(tiny: Served, tmp_path: Path) -> None:
    flags = [
        "--url",
        tiny.url(""),
        "--out",
        str(tmp_path),
        "--seconds",
        "4",
        "--levels",
        "2",
        "--slo",
        "ttft:60000,itl:60000",
    ]
    lengths = ["--prompt-tokens", "8:40", "--output-tokens", "4:24", "--turns", "1:2", "--think-s", "0.1"]
    assert main(["run", *flags, "--", *lengths]) == 0
    page, told = report(tmp_path)
    assert page.count("data:image/png;base64,") == 5 and not re.search(r'(src|href)="(?!data:)', page)
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in ("throughput", "goodput", "queue"))
    rows = {row["what"]: row for row in told["server"]}  # type: ignore[attr-defined]
    ttft, gaps = rows["time to first token, number"], rows["inter token, number"]
    assert ttft["ours"] == ttft["theirs"] > 0 and gaps["theirs"] >= gaps["ours"] > 0


def test_a_broken_promise_is_the_exit_code(tiny: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--url", tiny.url(""), "--out", str(tmp_path), "--seconds", "2", "--rate", "4", "--slo", "ttft:0.01"]
    assert main(["sweep", *flags, "--", "--prompt-tokens", "8", "--output-tokens", "4"]) == 1
    assert "SLO broken: TTFT" in capsys.readouterr().out
    page, told = report(tmp_path)
    assert "SLO broken" in page and told["verdict"] == "none"


def test_a_server_without_metrics_is_watched_in_vain() -> None:
    with Watch(("http://127.0.0.1:9",)) as watch:
        pass
    assert watch.before == watch.after == {} and not watch.glances
