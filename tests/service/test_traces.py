"""One trace of a request, from the door to the worker; and nothing where nobody wants one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from service.broker.base import Job
from service.metrics_work import WorkMetrics
from service.traces import Traces
from service.worker import Stay
from tests.service.helpers_http import SERVED, Door, say
from tests.service.test_metrics_work import Stats

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENTS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


class Traced:
    """A door and a worker whose spans are kept."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = Traces("http://127.0.0.1:1", "test", "0", self._exporter)
        self.door = Door(say("hello"))
        self.door.backend.traces = self.traces

    async def ask(self, **fields: Any) -> None:
        """With a client's own trace."""
        await self.door.ask("POST", "/generate", json={"prompt": "hi", **fields}, headers=CLIENTS)

    def work(self, fate: str = "stop", so_far: tuple[int, ...] = ()) -> None:
        """What a worker would tell of the request that was asked for last."""
        work: WorkMetrics[Stats] = WorkMetrics(CollectorRegistry(), traces=self.traces)
        now_s, job = time.monotonic(), Job(self.door.broker.requests[-1], so_far)
        work.on_leave(Stay(job, 1, now_s - 2, now_s - 1, now_s, 5, fate))

    def spans(self) -> dict[str, Any]:
        """Those that have ended, by name."""
        self.traces._provider.force_flush()
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def traced() -> Iterator[Traced]:
    it = Traced()
    yield it
    it.traces.close()


async def test_door_queue_and_engine_are_one_trace_below_the_clients(traced: Traced) -> None:
    await traced.ask(max_tokens=7)
    traced.work()
    spans = traced.spans()
    door = spans[f"text_completion {SERVED.name}"]
    assert set(spans) == {door.name, "queue", "engine"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert f"{door.parent.span_id:016x}" == "b7ad6b7169203331"
    assert spans["queue"].parent.span_id == spans["engine"].parent.span_id == door.context.span_id
    assert [event.name for event in door.events] == ["first token"]
    assert [event.name for event in spans["engine"].events] == ["admitted", "first token"]
    assert spans["queue"].end_time == spans["engine"].start_time


async def test_the_words_are_the_conventions_and_there_is_no_text(traced: Traced) -> None:
    await traced.ask(max_tokens=7, seed=3)
    told = traced.spans()[f"text_completion {SERVED.name}"].attributes
    wanted = {"request.max_tokens": 7, "request.seed": 3, "usage.input_tokens": 2, "usage.output_tokens": 5}
    assert {name: told[f"gen_ai.{name}"] for name in wanted} == wanted
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert "hello" not in str(dict(told))


async def test_a_refusal_ends_its_trace(traced: Traced) -> None:
    await traced.ask(max_tokens=-1)
    assert traced.spans()["text_completion"].attributes["error.type"] == "invalid_request"


async def test_a_take_over_has_no_second_wait(traced: Traced) -> None:
    await traced.ask()
    traced.work("error", so_far=(1, 2))
    spans = traced.spans()
    assert "queue" not in spans
    assert spans["engine"].attributes["millrace.taken_over_tokens"] == 2
    assert not spans["engine"].status.is_ok


def test_off_it_imports_nothing() -> None:
    """That is ours: redis-py looks for OpenTelemetry's metrics by itself."""
    wanted = "{'opentelemetry.exporter', 'opentelemetry.sdk.trace'}"
    program = f"import sys, service.api, service.work; assert not {wanted} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
