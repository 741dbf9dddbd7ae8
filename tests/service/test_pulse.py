"""The worker's line every ten seconds."""

import logging
from dataclasses import dataclass
from typing import Any

import pytest

from service.pulse import Pulse


@dataclass
class Stats:
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 10
    num_free_blocks: int = 10
    last_rows: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    preemptions_total: int = 0


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of each line so far, which are forgotten then."""
    found = [vars(record)["fields"] for record in caplog.records]
    caplog.clear()
    return found


def test_a_line_has_rates_since_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 100.0
    stats = Stats()
    pulse = Pulse(lambda: stats, lambda: now_s)
    stats = Stats(3, 1, num_free_blocks=4, prompt_tokens_total=50, output_tokens_total=200)
    now_s += 10
    pulse.beat()
    rates = {"prompt_tokens_per_s": 5.0, "output_tokens_per_s": 20.0, "preemptions": 0}
    assert told(caplog) == [{"running": 3, "waiting": 1, "cache": 0.6, **rates}]
    stats = Stats(3, 1, num_free_blocks=4, prompt_tokens_total=50, output_tokens_total=230)
    now_s += 10
    pulse.beat()
    assert told(caplog)[0]["output_tokens_per_s"] == 3.0


def test_an_idle_engine_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stats: Stats | None = None
    pulse = Pulse(lambda: stats)
    pulse.beat()
    stats = Stats(output_tokens_total=9)
    pulse.beat()
    pulse.beat()
    pulse.beat()
    assert [line["output_tokens_per_s"] > 0 for line in told(caplog)] == [True, False]
