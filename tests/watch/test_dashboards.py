"""Dashboards, alerts and metrics: well formed, as generated, and nothing in them stays empty where there is load."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.faults.client import ask, replay
from tests.faults.conftest import HANG_S, STORYTELLER
from tests.faults.conftest import MISSING as NO_REDIS
from tests.faults.load import Load, bodies
from tests.faults.procs import ROOT, Cluster, wait
from tests.faults.redis_server import RedisServer, free_port
from tests.model.conftest import random_decoder, save_folder
from tests.watch.collector import Collector
from tests.watch.prometheus import DEPLOYED, Prometheus, needs_prometheus, promtool

GRAFANA = ROOT / "deploy" / "grafana"
BOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
WINDOW = "15s"  # of rates, in place of Grafana's: two scrapes at least


def expressions() -> list[tuple[str, str]]:
    """Where each stands, and what it asks."""
    return [
        (f"{board.stem}, {panel['title']}, {target['refId']}", target["expr"].replace("$__rate_interval", WINDOW))
        for board in BOARDS
        for panel in json.loads(board.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ]


def test_the_dashboards_are_what_their_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "make.py", tmp_path], check=True, timeout=60)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in BOARDS
    }


@needs_prometheus
def test_promtool_finds_no_fault_with_configuration_and_rules() -> None:
    promtool("check", "config", "--syntax-only", str(DEPLOYED / "prometheus.yml"))
    promtool("check", "rules", str(DEPLOYED / "alerts.yml"))
    promtool("test", "rules", str(DEPLOYED / "alerts_test.yml"))


@needs_prometheus
def test_promtool_can_read_every_panel(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": expr} for i, (_, expr) in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", str(tmp_path / "panels.yml"))


def test_every_alert_says_what_to_do_and_is_tried() -> None:
    alerts = [
        rule for group in yaml.safe_load((DEPLOYED / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    tried = (DEPLOYED / "alerts_test.yml").read_text()
    for alert in (rule for rule in alerts if "alert" in rule):
        assert alert["annotations"]["summary"] and alert["annotations"]["runbook"], alert["alert"]
        assert alert["labels"]["severity"] in ("page", "warn")
        assert alert["alert"] in tried


@dataclass
class Run:
    """One api and one worker that have had some load, and a Prometheus that reads both."""

    prometheus: Prometheus
    collector: Collector
    expositions: dict[str, str]


async def _load(port: int) -> None:
    """Whole answers, one refused, one that is left, one out of time, one read again."""
    async with Load(lambda: [port], bodies(6, 60)) as load:
        for fields in ({"prompt": ""}, {"prompt": "x", "max_tokens": 900, "timeout_s": 0.3}):
            await ask(port, "POST", "/generate", fields)
        left = await ask(port, "POST", "/generate", {"prompt": "x", "max_tokens": 900, "background": True})
        await asyncio.gather(*load._tasks)
        await ask(port, "DELETE", f"/generate/{json.loads(left.body)['id']}")
        await replay(port, load.readings[0].id)


def _read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("watch")
    model = save_folder(random_decoder(STORYTELLER), folder / "storyteller")
    with Collector() as collector, RedisServer(folder / "redis") as redis, Cluster(redis, model, folder) as cluster:
        api, port = cluster.api("--otlp-endpoint", collector.url), free_port()
        cluster.worker("--metrics-port", str(port), "--otlp-endpoint", collector.url)
        cluster.until_ready()
        with Prometheus(folder, {"api": [api.port], "worker": [port]}) as prometheus:
            wait(lambda: len(prometheus.ask("up == 1")) == 2, "both are read")
            asyncio.run(_load(api.port))
            # A tenant's counters are there from his first request on: only what comes after they were read has a rate.
            wait(lambda: bool(prometheus.ask("millrace_tenant_requests_accepted_total > 0")), "the tenant is told")
            asyncio.run(_load(api.port))
            wait(lambda: bool(prometheus.ask('millrace_queue_ended_total{outcome="cancelled"} > 1')), "all is told")
            yield Run(prometheus, collector, {"api": _read(api.port), "worker": _read(port)})


@needs_prometheus
@pytest.mark.skipif(bool(NO_REDIS), reason=str(NO_REDIS))
@pytest.mark.timeout(HANG_S)
class TestLive:
    """Against what a real run has told."""

    def test_no_panel_is_empty(self, run: Run) -> None:
        asked_for, empty = expressions(), list[str]()

        def complete() -> bool:
            empty[:] = [where for where, expr in asked_for if not run.prometheus.ask(expr)]
            return not empty

        try:
            wait(complete, "every panel shows something", guard_s=12)
        except AssertionError:
            raise AssertionError(f"empty: {empty}") from None

    def test_rules_can_be_evaluated_and_none_of_them_fires(self, run: Run) -> None:
        assert run.prometheus.sick_rules() == []
        fires = {sample["metric"]["alertname"] for sample in run.prometheus.ask('ALERTS{alertstate="firing"}')}
        assert fires == set()
        assert run.prometheus.ask("millrace:late_first_tokens:ratio5m") != []

    def test_a_request_is_one_trace_over_both_processes(self, run: Run) -> None:
        whole = {
            ("millrace-api", "text_completion storyteller"),
            ("millrace-worker", "queue"),
            ("millrace-worker", "engine"),
        }
        wait(lambda: list(run.collector.traces().values()).count(whole) >= 6, "six whole traces")

    @pytest.mark.parametrize("who", ["api", "worker"])
    def test_promtool_finds_no_fault_with_names_and_helps(self, run: Run, who: str) -> None:
        assert promtool("check", "metrics", given=run.expositions[who]) == ""
