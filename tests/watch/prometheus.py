"""A real Prometheus that reads what is deployed, and promtool.

Without them these tests are skipped, and the end of the run says so; with REQUIRE_PROMETHEUS=1, as in CI, they fail.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml

from tests.faults.procs import ROOT, wait
from tests.faults.redis_server import free_port

DEPLOYED = ROOT / "deploy" / "prometheus"
REQUIRED = os.environ.get("REQUIRE_PROMETHEUS") == "1"
SCRAPE_S = 1  # between two scrapes


def missing() -> str | None:
    """What is not installed, in a sentence, or None."""
    lacking = [name for name in ("promtool", "prometheus") if shutil.which(name) is None]
    return f"{' and '.join(lacking)}: not installed; deploy/prometheus.sh installs both" if lacking else None


needs_prometheus = pytest.mark.skipif(bool(missing()) and not REQUIRED, reason=str(missing()))


def promtool(*words: str, given: str = "") -> str:
    """What it says of what it was `given`. Raises `AssertionError` with that, if it finds fault."""
    done = subprocess.run(["promtool", *words], input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """With the configuration that is deployed, but for addresses and times. `targets` are ports, by job."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[int]]) -> None:
        self._folder, self._port = folder, free_port()
        deployed = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text(encoding="utf-8"))
        deployed["global"] |= {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "1s"}
        deployed["rule_files"] = [str(DEPLOYED / name) for name in deployed["rule_files"]]
        for job in deployed["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in targets[job["job_name"]]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(deployed), encoding="utf-8")

    def __enter__(self) -> "Prometheus":
        command = ["prometheus", f"--config.file={self._folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={self._folder}/tsdb", f"--web.listen-address=127.0.0.1:{self._port}"]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait(self._is_ready, "Prometheus is ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an expression now, without those that are no number. Raises `HTTPError` if it is none."""
        query = urllib.parse.urlencode({"query": expr})
        found: list[dict[str, Any]] = self._get(f"/api/v1/query?{query}")["data"]["result"]
        return [sample for sample in found if sample["value"][1] != "NaN"]

    def sick_rules(self) -> list[str]:
        """Rules that could not be evaluated, with the reason."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        assert groups, "no rules were read"
        return [
            f"{rule['name']}: {rule.get('lastError')}" for g in groups for rule in g["rules"] if rule["health"] == "err"
        ]

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
            return json.load(answer)
