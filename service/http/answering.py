"""From a request's bytes to its answer, for every dialect: refuse early, take in, submit, and read while it comes.

It knows the order of these, and neither field names nor shapes: a route brings those along.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.responses import Response

from service.errors import IdempotencyConflict, MillraceError, Overloaded
from service.http.backend import Backend
from service.http.body import read_json
from service.http.generation import Generation
from service.http.intake import Asked, Client, Intake, Served, take_in
from service.http.limits import VISIT, Visit
from service.http.reply import Dialect
from service.http.resume import admitted, idempotency_key
from service.http.sse import EventStream
from service.http.whole import submitted, whole
from service.logs import fields
from service.metrics import Metrics
from service.traces import Trace

logger = logging.getLogger(__name__)
CLIENT = "millrace.client"  # in a scope: who asks, a `Client`

Speak = Callable[[Intake, Served], Dialect]


@dataclass(frozen=True, slots=True)
class Order:
    """What a route makes of a body: what is asked, and how it is answered. `submitted` answers what is asked for in the
    background; `headers` go with every answer."""

    asked: Asked
    speak: Speak
    submitted: Callable[[Intake], Response] = submitted
    headers: Mapping[str, str] = field(default_factory=dict)


Read = Callable[[object, Served], Order]  # raises what is wrong with a body


def client_of(request: Request) -> Client:
    """Who asks."""
    client: Client = request.scope.get(CLIENT) or Client()
    return client


class Answering:
    """Over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    async def answer(self, request: Request, read: Read) -> Response:
        """Whole, as a stream, or at once if it is for later. Refusals are raised before any of it begins."""
        arrived_s, client = time.monotonic(), client_of(request)
        visit: Visit | None = request.scope.get(VISIT)
        traces = self._backend.traces
        trace = None if traces is None else traces.begin(request.scope["path"], client.traceparent)
        if trace is not None:
            client = replace(client, traceparent=trace.traceparent)
        with refusals(self._metrics, client, trace):
            served, broker = self._backend.get()
            if visit is not None:
                visit.enter()
            data = await read_json(request)
            order = read(data, served)
            key = idempotency_key(request, data)
            load = await broker.load()
            if load.full and key is None:  # one with a key may be in already, and then takes no room
                raise Overloaded(load.retry_after_s, load.num_waiting)
            taken = await take_in(order.asked, served, client)
            if visit is not None:
                visit.reserve(taken.most_tokens)
            intake = await admitted(broker, taken, key, served)
            if intake.group[0].task != taken.group[0].task:  # the same body and key, on another route
                raise IdempotencyConflict
        body = order.asked.body
        to_leave_is_to_cancel = not (body.resumable or body.background)
        generation = Generation(intake, served, broker, self._metrics, cancels=to_leave_is_to_cancel, trace=trace)
        if intake is taken:
            generation.begin(arrived_s)
        if visit is not None:
            visit.used = generation.used if intake is taken else lambda: 0
        if body.background and not body.stream:
            await generation.close()
            return _with_headers(order.submitted(intake), order.headers)
        if intake is not taken:
            self._metrics.resumed.inc()
        dialect = order.speak(intake, served)
        if body.stream:
            return EventStream(generation, dialect, order.headers, body.progress)
        return _with_headers(await whole(request, generation, dialect), order.headers)


@contextmanager
def refusals(metrics: Metrics, client: Client, trace: Trace | None = None) -> Iterator[None]:
    """Counts and logs what is refused, and ends its trace."""
    try:
        yield
    except MillraceError as error:
        metrics.refused(error.code)
        told = fields(request_id=client.request_id, tenant=client.tenant, outcome="refused", code=error.code)
        logger.info("request refused", extra=told)
        if trace is not None:
            trace.refuse(error.code)
        raise


def _with_headers(response: Response, headers: Mapping[str, str]) -> Response:
    response.headers.update(headers)
    return response
