"""For every test: one torch thread. Tiny matrices gain nothing from more, and threads that wait for each other on a
busy machine cost seconds. Tests of thread counts set their own. And no time limit on a Hypothesis example: on a busy
machine it fails good code. And what the machine lacks is told at the end, loudly: a green run without it shows less
than it seems to."""

import os

import pytest
import torch
from hypothesis import settings

from tests.browser.driver import missing as browser_missing
from tests.faults.redis_server import missing as redis_missing
from tests.watch.prometheus import missing as prometheus_missing

torch.set_num_threads(1)
settings.register_profile("millrace", deadline=None)
settings.load_profile("millrace")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, and what that leaves untested."""
    for name, why, untested in (
        ("REDIS", redis_missing(), "Nothing about take-over, resuming or Redis was tested."),
        ("PROMETHEUS", prometheus_missing(), "Metrics, alerts and dashboards were not checked by promtool."),
        ("BROWSER", browser_missing(), "Nothing of the chat page was tried."),
    ):
        if why and os.environ.get(f"REQUIRE_{name}") != "1":
            terminalreporter.write_sep("=", f"{name} TESTS WERE SKIPPED", yellow=True, bold=True)
            terminalreporter.write_line(f"{why}. {untested}")
