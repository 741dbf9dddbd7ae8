"""Spans for an OTLP endpoint: one trace of a request from the door through the queue to a worker and its last token.

The words are those of OpenTelemetry's conventions for generative AI. Without an endpoint nothing of OpenTelemetry is
imported and there is no object of these; who may have one holds `Traces | None`. Spans are made when what they tell of
is over, from stamps that are taken anyway, so that a token costs nothing. Text is never told.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from model.request import Request
from service.errors import StartupError

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
CHAT = ("/v1/chat/completions", "/v1/responses")


class Traces:
    """Of one process, until `close`. Raises `StartupError` where the packages are not installed. `exporter` takes the
    place of OTLP's."""

    def __init__(self, endpoint: str, service: str, version: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise StartupError(f"--otlp-endpoint needs packages: pip install 'millrace[trace]' ({error})") from None
        self._api, self._propagator = trace, TraceContextTextMapPropagator()
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        resource = Resource.create({"service.name": service, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("millrace", version)

    def begin(self, path: str, traceparent: str) -> "Trace":
        """A client's request has come to this path; `traceparent` is the client's, or ""."""
        operation = "chat" if path in CHAT else "text_completion"
        span = self.span(operation, traceparent, self._api.SpanKind.SERVER, {"gen_ai.operation.name": operation})
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return Trace(span, operation, carrier["traceparent"])

    def worked(
        self, request: Request, claimed_s: float, first_s: float | None, num_before: int, num_tokens: int, fate: str
    ) -> None:
        """A request has left a worker now. Stamps are `time.monotonic`'s; `num_before` ids it had when it came."""
        if not request.traceparent:
            return
        claimed_ns = epoch_ns(claimed_s)
        if not num_before:
            submitted_ns = int(request.created_s * 1e9)
            self.span("queue", request.traceparent, self._api.SpanKind.INTERNAL, {}, submitted_ns).end(claimed_ns)
        told = {**asked(request), "gen_ai.usage.output_tokens": num_tokens, "millrace.taken_over_tokens": num_before}
        span = self.span("engine", request.traceparent, self._api.SpanKind.CONSUMER, told, claimed_ns)
        span.add_event("admitted", timestamp=claimed_ns)
        if first_s is not None:
            span.add_event("first token", timestamp=epoch_ns(first_s))
        _finish(span, (fate,))

    def span(self, name: str, traceparent: str, kind: Any, attributes: Attributes, start_ns: int | None = None) -> Any:
        """A span below the one that `traceparent` tells of."""
        context = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        return self._tracer.start_span(name, context=context, kind=kind, attributes=attributes, start_time=start_ns)

    def close(self) -> None:
        """What has not been sent yet is sent, if the endpoint answers soon."""
        self._provider.force_flush(2000)
        self._provider.shutdown()


class Trace:
    """One client request's span at the door. `traceparent` makes others its children."""

    def __init__(self, span: Any, operation: str, traceparent: str) -> None:
        self._span, self._operation, self.traceparent = span, operation, traceparent

    def refuse(self, code: str) -> None:
        """The request was answered with an error, which has this code."""
        self._span.set_attribute("error.type", code)
        _finish(self._span, ())

    def end(self, request: Request, usage: Attributes, outcomes: Sequence[str], first_s: float | None) -> None:
        """Its client has its answer, or has gone. `first_s` is when the first token came, on `time.monotonic`."""
        self._span.update_name(f"{self._operation} {request.model}")
        self._span.set_attributes({**asked(request), **usage})
        if first_s is not None:
            self._span.add_event("first token", timestamp=epoch_ns(first_s))
        _finish(self._span, outcomes)


def asked(request: Request) -> dict[str, str | int | float]:
    """What was asked for, in the conventions' words."""
    sampling = request.sampling
    return {
        "gen_ai.provider.name": "millrace",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.response.id": request.group,
        "gen_ai.response.model": request.model,
        "gen_ai.usage.input_tokens": len(request.asked_ids),
    }


def epoch_ns(monotonic_s: float) -> int:
    """A stamp of `time.monotonic` as nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def _finish(span: Any, outcomes: Sequence[str]) -> None:
    from opentelemetry.trace import StatusCode  # here, since without an endpoint nobody comes here

    if outcomes:
        span.set_attribute("gen_ai.response.finish_reasons", list(outcomes))
    if "error" in outcomes or "abandoned" in outcomes:
        span.set_status(StatusCode.ERROR)
    span.end()
