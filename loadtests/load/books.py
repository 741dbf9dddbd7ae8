"""Where the records of a run go: into Locust's statistics, and raw, from any number of processes, into one file.

It sends nothing and knows no dialect.
"""

from pathlib import Path
from typing import Any

from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtests.load import records
from loadtests.load.figures import Slo, summary
from loadtests.load.records import Record

RAW = "millrace_records"


class Failed(Exception):
    """How Locust is told what went wrong; its text is what its table of failures counts by."""


class Books:
    """Of one process. A worker's records go to its master, every three seconds and at the end."""

    def __init__(self, environment: Environment) -> None:
        self._environment, self._fresh = environment, list[dict[str, Any]]()
        events = environment.events
        events.report_to_master.add_listener(self._report)
        events.worker_report.add_listener(self._reported)
        events.quitting.add_listener(self._close)

    def note(self, record: Record, path: str) -> None:
        """A request is over."""
        self._fresh.append(records.as_dict(record))
        failure = Failed(record.outcome) if record.is_error else None
        self._environment.events.request.fire(
            request_type="POST",
            name=path if record.outcome != records.LEFT else f"{path} (left)",
            response_time=(record.e2e_s or 0.0) * 1e3,
            response_length=record.num_output,  # tokens, not bytes
            exception=failure,
            context={},
        )
        # Rows of their own, and not part of the total, which is of requests.
        if record.ttft_s is not None:
            self._log("TTFT, ms", record.kind, record.ttft_s * 1e3)
        for gap_s in record.gaps_s:
            self._log("between tokens, ms", record.kind, gap_s * 1e3)
        if record.tpot_s:
            self._log("tokens/s", record.kind, 1 / record.tpot_s)

    def _log(self, method: str, kind: str, value: float) -> None:
        self._environment.stats.get(kind, method).log(value, 0)

    def _report(self, client_id: str, data: dict[str, Any]) -> None:
        data[RAW], self._fresh = self._fresh, []

    def _reported(self, client_id: str, data: dict[str, Any]) -> None:
        self._fresh += data.pop(RAW, [])

    def _close(self, environment: Environment) -> None:
        """Write the records and settle the exit code, where all of them have come together."""
        if isinstance(environment.runner, WorkerRunner):
            return
        options = environment.parsed_options
        if options.records:
            Path(options.records).unlink(missing_ok=True)
            records.write(Path(options.records), self._fresh)
        told = summary([Record(**each) for each in self._fresh])
        if options.slo:
            broken = Slo.parse(options.slo).broken(told)
            for line in broken:
                print(f"SLO broken: {line}")
            environment.process_exit_code = int(bool(broken))
        if isinstance(environment.runner, MasterRunner):
            self._fresh = []
