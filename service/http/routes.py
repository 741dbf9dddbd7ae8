"""The routes of the native dialect, and those that watch: health, readiness, metrics, models.

A handler reads, asks and shapes; rules are in `intake.py`, naming a stored request in `resume.py`, the life of a
request in `generation.py`, what OpenAPI says of it all in `openapi.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.broker.base import RequestSide
from service.errors import MillraceError, Overloaded, Unavailable
from service.http.body import check, read_json
from service.http.generation import Generation
from service.http.intake import Served, take_in
from service.http.openapi import CANCEL, GENERATE, READ, problems
from service.http.reply import Native
from service.http.resume import admitted, idempotency_key, reading, stored
from service.http.schemas import ALLOWED, GenerateRequest
from service.http.sse import HEAD, EventStream
from service.http.whole import submitted, whole
from service.metrics import Metrics

LOADING = "loading"
TENANT = "default"  # the only one, until there are keys


class Backend:
    """What stands behind the door: nothing while the model loads, then a model and a broker.

    `watch` says why no request should be sent here now (draining, stuck, no worker), for `/ready`; `refuse` why one
    that comes all the same is refused, where that is less strict. Both give None for no reason. `facts` are told by
    `/ready` when it is. The composition root owns this object.
    """

    def __init__(
        self,
        watch: Callable[[], str | None] = lambda: None,
        refuse: Callable[[], str | None] | None = None,
        facts: Callable[[], dict[str, object]] = dict,
    ) -> None:
        self.served: Served | None = None
        self.broker: RequestSide | None = None
        self._watch, self._refuse, self.facts = watch, refuse, facts

    def loaded(self, served: Served, broker: RequestSide) -> None:
        """From now on requests are served, with this. May be called again; requests that run keep what they have."""
        self.served, self.broker = served, broker

    def ready(self) -> str | None:
        """None, or the reason why not."""
        return LOADING if self.served is None else self._watch()

    def open(self) -> tuple[Served, RequestSide]:
        """What is loaded, ready or not. Raises `Unavailable`."""
        if self.served is None or self.broker is None:
            raise Unavailable(LOADING)
        return self.served, self.broker

    def get(self) -> tuple[Served, RequestSide]:
        """For a new request or reader. Raises `Unavailable` if it is refused."""
        opened = self.open()
        reason = (self._refuse or self._watch)()
        if reason is not None:
            raise Unavailable(reason)
        return opened


class Routes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add, stored_url = router.add_api_route, "/generate/{id}"
        add("/generate", self.generate, methods=["POST"], summary="Continue a prompt", **GENERATE)
        add(stored_url, self.read, methods=["GET"], summary="Read a request, from any position", **READ)
        add(stored_url, self.cancel, methods=["DELETE"], summary="Cancel a request, wherever it is", **CANCEL)
        add("/v1/models", self.models, summary="The served model")
        add("/health", self.health, summary="Alive: 200 as long as the process answers")
        add("/ready", self.ready, summary="Ready to serve: 200, or 503 and why", responses=problems(503))
        add("/metrics", self.metrics, summary="Prometheus metrics", response_class=Response)
        return router

    async def generate(self, request: Request) -> Response:
        """Answer with JSON, with a stream of events if `stream` is true, or at once with where to read if `background`
        is. Refusals always have their own status."""
        arrived_s = time.monotonic()
        with self._refusals():
            served, broker = self._backend.get()
            data = await read_json(request)
            body = check(GenerateRequest, data, ALLOWED)
            key = idempotency_key(request, data)
            load = await broker.load()
            if load.full and key is None:  # one with a key may be in already, and then takes no room
                raise Overloaded(load.retry_after_s, load.num_waiting)
            taken = await take_in(body, served, TENANT)
            intake = await admitted(broker, taken, key, served)
        to_leave_is_to_cancel = not (body.resumable or body.background)
        generation = Generation(intake, served, broker, self._metrics, cancels=to_leave_is_to_cancel)
        if intake is taken:
            generation.begin(arrived_s)
        if body.background:
            await generation.close()
            return submitted(intake)
        if intake is not taken:
            self._metrics.resumed.inc()
        dialect = Native(intake, served.tokenizer)
        return EventStream(generation, dialect) if body.stream else await whole(request, generation, dialect)

    async def read(self, request: Request, id: str) -> Response:
        """The events of a stored request after those that the client has, or all of it. To leave ends nothing."""
        with self._refusals():
            served, broker = self._backend.get()
            intake = await stored(broker, id, TENANT, served)
            after = reading(request, intake)
        if request.scope.get(HEAD) and after is None:  # it would wait for the answer
            return Response(media_type="application/json")
        if not request.scope.get(HEAD):
            self._metrics.resumed.inc()
        generation = Generation(intake, served, broker, self._metrics, after or ())
        dialect = Native(intake, served.tokenizer)
        return await whole(request, generation, dialect) if after is None else EventStream(generation, dialect)

    async def cancel(self, id: str) -> Response:
        """Taken on while this process serves others no more, for it makes room."""
        with self._refusals():
            _, broker = self._backend.open()
            for child in await broker.lookup(id, TENANT):
                await broker.cancel(child.id, TENANT)
        return JSONResponse({"id": id, "status": "cancelling"}, 202)

    async def models(self) -> Response:
        """In the shape of OpenAI's list."""
        served, _ = self._backend.get()
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "millrace"}
        return JSONResponse({"object": "list", "data": [card | {"max_model_len": served.max_model_len}]})

    async def health(self) -> Response:
        """Says nothing of the model: a loading or draining process is alive."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """For load balancers."""
        reason = self._backend.ready()
        if reason is not None:
            raise Unavailable(reason)
        return JSONResponse({"status": "ready", **self._backend.facts()})

    async def metrics(self) -> Response:
        """The queue is asked now; everything else was counted when it happened."""
        if self._backend.broker is not None:
            with suppress(Unavailable):  # what else there is must be seen then more than ever
                load = await self._backend.broker.load()
                self._metrics.on_load(load.num_waiting, load.num_running)
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Counts what is refused."""
        try:
            yield
        except MillraceError as error:
            self._metrics.refused(error.code)
            raise
