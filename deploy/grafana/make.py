"""Writes the dashboards beside it: a line for each panel here, some thirty in JSON.

usage: python deploy/grafana/make.py [FOLDER]. A test holds the committed files to what this writes, and asks a live
Prometheus every expression.
"""

import json
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

WIDTH = 24  # of a row, in Grafana's grid
RATE = "[$__rate_interval]"
GREEN, YELLOW, RED, GREY = "green", "yellow", "red", "text"
Queries = tuple[tuple[str, str], ...]  # expression, legend
Steps = tuple[tuple[float | None, str], ...]  # from this value on, that colour


@dataclass(frozen=True)
class Panel:
    """One question. A `stat` is read from a distance: a number on its colour, over its own history."""

    title: str
    about: str
    queries: Queries
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 12
    steps: Steps = ((None, GREEN),)
    max: float | None = None
    words: dict[str, str] | None = None  # of values, in place of numbers

    @property
    def height(self) -> int:
        return 6 if self.kind == "stat" else 8

    def written(self, id: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana reads it."""
        targets = [
            {"refId": chr(65 + i), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
            | ({"format": "heatmap"} if self.kind == "heatmap" else {})
            for i, (expr, legend) in enumerate(self.queries)
        ]
        nothing = {"type": "special", "options": {"match": "null+nan", "result": {"text": "no requests"}}}
        named = {value: {"text": word} for value, word in (self.words or {}).items()}
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "min": 0,
            "mappings": [nothing, *([{"type": "value", "options": named}] if named else [])],
            "thresholds": {"mode": "absolute", "steps": [{"value": at, "color": colour} for at, colour in self.steps]},
        }
        if self.max is not None:
            defaults["max"] = self.max
        options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}}
        if self.kind == "stat":
            options = {"colorMode": "background", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
        elif self.kind == "heatmap":
            options = {"calculate": False, "color": {"scheme": "Oranges", "mode": "scheme"}, "yAxis": {"unit": "s"}}
        else:
            defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        return {
            "id": id,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": targets,
        }


SOURCE = {"type": "prometheus", "uid": "prometheus"}


def rate(name: str, by: str = "") -> str:
    """Of a counter, a second, summed over processes."""
    return f"sum{f' by ({by})' if by else ''} (rate(millrace_{name}{RATE}))"


def quantiles(name: str) -> Queries:
    """Of a histogram: the usual ones, and the mean."""
    found = [
        (f"histogram_quantile({q}, sum by (le) (rate(millrace_{name}_bucket{RATE})))", f"p{q * 100:.0f}")
        for q in (0.5, 0.9, 0.95, 0.99)
    ]
    return (*found, (f"{rate(name + '_sum')} / {rate(name + '_count')}", "mean"))


def spread(title: str, name: str, about: str, unit: str = "s") -> Panel:
    """A histogram over time."""
    return Panel(title, about, quantiles(name), unit)


def stat(title: str, about: str, expr: str, unit: str = "short", **more: Any) -> Panel:
    """One number."""
    return Panel(title, about, ((expr, ""),), unit, kind="stat", width=more.pop("width", 6), **more)


OURS = 'requests_refused_total{reason=~"overloaded|unavailable|internal_error"}'
ERRORS = 'requests_ended_total{outcome="error"}'


def with_refused(name: str) -> str:
    """A counter's rate, and that of refusals that are our fault."""
    return f"({rate(name)} + ({rate(OURS)} or vector(0)))"


OWN_BOOKS = (
    "sum(millrace_requests_accepted_total) - sum(millrace_requests_ended_total) - sum(millrace_requests_in_flight)"
)
QUEUE_BOOKS = (
    "max(abs(millrace_queue_accepted_total - on (instance, job) sum by (instance, job) (millrace_queue_ended_total)"
    " - on (instance, job) millrace_requests_waiting - on (instance, job) millrace_requests_running))"
)
GOOD_IS_HIGH: Steps = ((None, RED), (0.95, YELLOW), (0.99, GREEN))

STATUS = (
    stat("Status", "Whether any process takes new requests.", "max(millrace_ready)",
         words={"0": "DOWN", "1": "ONLINE"}, steps=((None, RED), (1, GREEN)), max=1),
    stat("Response", "Median time to the first token.",
         f"histogram_quantile(0.5, sum by (le) (rate(millrace_time_to_first_token_seconds_bucket{RATE})))", "s",
         steps=((None, GREEN), (1, YELLOW), (3, RED))),
    stat("Speed", "Tokens a second that a running request gets.",
         f"{rate('inter_token_seconds_count')} / {rate('inter_token_seconds_sum')}", "short",
         steps=((None, RED), (10, YELLOW), (20, GREEN))),
    stat("Success", "Share of requests without an error or refusal of ours.",
         f"1 - {with_refused(ERRORS)} / {with_refused('requests_accepted_total')}", "percentunit",
         steps=GOOD_IS_HIGH, max=1),
    stat("Requests", "Sequences a minute.", f"60 * {rate('requests_accepted_total')}", steps=((None, GREY),)),
    stat("Waiting", "Sequences in the queue.", "max(millrace_requests_waiting)", steps=((None, GREEN), (64, YELLOW),
         (200, RED))),
    stat("Oldest wait", "Of what waits now.", "max(millrace_oldest_wait_seconds)", "s",
         steps=((None, GREEN), (5, YELLOW), (30, RED))),
    stat("Workers", "That are alive and compute this model.", "max(millrace_workers)", steps=((None, RED), (1, GREEN))),
    stat("Cache", "Share of the blocks in use, of the fullest worker.", "max(millrace_cache_use_ratio)", "percentunit",
         steps=((None, GREEN), (0.9, YELLOW)), max=1),
    stat("Redis memory", "Of what Redis may use; 0 where it has no limit.",
         "max(millrace_redis_memory_bytes) / (max(millrace_redis_max_memory_bytes) > 0) or vector(0)", "percentunit",
         steps=((None, GREEN), (0.6, YELLOW), (0.8, RED)), max=1),
    stat("Draining", "Processes that were told to stop.", "sum(millrace_draining)",
         steps=((None, GREEN), (1, YELLOW))),
    stat("Books", "Sequences that are neither ended nor in flight.", f"abs({OWN_BOOKS}) + {QUEUE_BOOKS}",
         steps=((None, GREEN), (1, RED))),
    Panel("Versions", "Processes of each.", (("count by (version) (millrace_build_info)", "{{version}}"),)),
    Panel("Processes", "That answer, and that take requests.",
          (("sum by (job) (up)", "{{job}} up"), ("sum(millrace_ready)", "ready"))),
)  # fmt: skip

LATENCY = (
    spread("Time to first token", "time_to_first_token_seconds", "From arrival to the first token, at the api."),
    spread("Between tokens", "inter_token_seconds", "Of a sequence, at the api."),
    spread("Whole request", "request_seconds", "From a request's arrival to its end."),
    spread("In the queue", "queue_seconds", "From submission to the first claim."),
    spread("Prefill", "prefill_seconds", "From a worker's claim to the first token it drew."),
    spread("Decode", "decode_seconds", "From the first token that a worker drew to its last."),
    Panel("First tokens, all of them", "Each column a moment, each row a range of seconds.",
          ((f"sum by (le) (increase(millrace_time_to_first_token_seconds_bucket{RATE}))", "{{le}}"),), "s", "heatmap"),
    Panel("Between tokens, all of them", "Each column a moment, each row a range of seconds.",
          ((f"sum by (le) (increase(millrace_inter_token_seconds_bucket{RATE}))", "{{le}}"),), "s", "heatmap"),
)  # fmt: skip

ENGINE = (
    Panel("Sequences", "In the batches, and held beside them.",
          (("sum(millrace_engine_sequences_running)", "running"),
           ("sum(millrace_engine_sequences_waiting)", "waiting"))),
    Panel("Tokens a second", "Computed of prompts, and drawn.",
          ((rate("prompt_tokens_total"), "in"), (rate("generated_tokens_total"), "out"))),
    Panel("Cache in use", "Share of the blocks.",
          (("millrace_cache_use_ratio", "{{instance}}"),), "percentunit", max=1),
    Panel("Preemptions", "A second: the cache was full.", ((rate("preemptions_total", "instance"), "{{instance}}"),)),
    Panel("Prompt tokens found in the cache", "Share of those looked for.",
          ((f"{rate('prefix_found_tokens_total')} / {rate('prefix_asked_tokens_total')}", "found"),),
          "percentunit", max=1),
    spread("Step", "step_seconds", "Of the engine."),
    spread("Batch", "batch_sequences", "Sequences in a step.", "short"),
    spread("Tokens in a step", "step_tokens", "Of prompts and drawn ones together.", "short"),
    Panel("Progress", "Since the last step, of an engine that has work; and steps a second.",
          (("millrace_engine_progress_age_seconds", "age {{instance}}"), (rate("engine_steps_total"), "steps/s"))),
    Panel("Tokens wasted", "A second, for sequences that nobody has the end of.",
          ((rate("wasted_tokens_total", "fate"), "{{fate}}"),)),
    Panel("Deaths", "Claims of what was claimed before, those with tokens of another worker, and writes refused.",
          ((f"sum(increase(millrace_redeliveries_total{RATE}))", "redelivered"),
           (f"sum(increase(millrace_take_overs_total{RATE}))", "taken over"),
           (f'sum(increase(millrace_requests_left_total{{fate="fenced"}}{RATE}))', "fenced"))),
)  # fmt: skip

QUEUE = (
    Panel("Queue", "As Redis has it.",
          (("max(millrace_requests_waiting)", "waiting"), ("max(millrace_requests_running)", "running"))),
    Panel("Oldest wait", "Of what waits now.", (("max(millrace_oldest_wait_seconds)", "seconds"),), "s"),
    Panel("Ends", "A second, by outcome.", ((rate("requests_ended_total", "outcome"), "{{outcome}}"),)),
    Panel("Refusals", "A second, by reason.", ((rate("requests_refused_total", "reason"), "{{reason}}"),)),
    Panel("Out of time", "A second, by the limit that was hit.",
          ((rate("requests_expired_total", "limit"), "{{limit}}"),)),
    Panel("Streams resumed", "A second.", ((rate("streams_resumed_total"), "resumed"),)),
    Panel("Tenants in flight", "Sequences of the ten with most.",
          (("topk(10, sum by (tenant) (millrace_tenant_requests_in_flight))", "{{tenant}}"),)),
    Panel("Tenants' requests", "A second, of the ten with most.",
          ((f"topk(10, {rate('tenant_requests_accepted_total', 'tenant')})", "{{tenant}}"),)),
    Panel("Tenants' tokens", "A second, prompts and answers, of the ten with most.",
          ((f"topk(10, {rate('tenant_prompt_tokens_total', 'tenant')}"
            f" + {rate('tenant_answer_tokens_total', 'tenant')})", "{{tenant}}"),)),
    Panel("Tenants' waits", "Mean seconds in the queue of a sequence.",
          ((f"{rate('tenant_queue_seconds_total', 'tenant')} / {rate('tenant_requests_accepted_total', 'tenant')}",
            "{{tenant}}"),), "s"),
    Panel("Books", "Sequences that are neither ended nor in flight: of the apis, and of the queue.",
          ((OWN_BOOKS, "apis"), (QUEUE_BOOKS, "queue"))),
    Panel("In flight", "At each api.", (("millrace_requests_in_flight", "{{instance}}"),)),
)  # fmt: skip

REDIS = (
    Panel("Memory", "Used, and allowed (0 is any).",
          (("max(millrace_redis_memory_bytes)", "used"), ("max(millrace_redis_max_memory_bytes)", "allowed")), "bytes"),
    spread("Round trip", "redis_round_trip_seconds", "Of a batch of calls, as our processes see it."),
    Panel("Round trips", "A second, of each process.",
          ((rate("redis_round_trip_seconds_count", "instance"), "{{instance}}"),)),
    Panel("Calls", "A second, by function.", ((rate("redis_calls_total", "function"), "{{function}}"),)),
    Panel("Errors", "A second: batches lost and calls refused.", ((rate("redis_errors_total", "kind"), "{{kind}}"),)),
    Panel("Away", "How long Redis has not answered.", (("millrace_redis_away_seconds", "{{instance}}"),), "s"),
    Panel("Commands", "A second, inside functions too.", (("max(millrace_redis_commands_per_second)", "commands/s"),)),
    Panel("Connections", "To Redis.", (("max(millrace_redis_clients)", "connections"),)),
)  # fmt: skip

BOARDS = {
    "status": ("Millrace: status", STATUS),
    "latency": ("Millrace: latency", LATENCY),
    "engine": ("Millrace: engine", ENGINE),
    "queue": ("Millrace: queue and tenants", QUEUE),
    "redis": ("Millrace: Redis", REDIS),
}


def board(name: str) -> dict[str, Any]:
    """A dashboard, its panels in rows from left to right."""
    title, panels = BOARDS[name]
    begins = [0, *accumulate(panel.width for panel in panels)]
    y, written = 0, []
    for i, panel in enumerate(panels):
        written.append(panel.written(i + 1, begins[i] % WIDTH, y))
        y += panel.height if (begins[i] + panel.width) % WIDTH == 0 else 0
    return {
        "uid": f"millrace-{name}",
        "title": title,
        "tags": ["millrace"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["millrace"], "title": "Millrace", "keepTime": True}],
        "panels": written,
    }


def written(name: str) -> str:
    """The file's text."""
    return json.dumps(board(name), indent=1) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards"
    for name in BOARDS:
        (folder / f"{name}.json").write_text(written(name), encoding="utf-8")
