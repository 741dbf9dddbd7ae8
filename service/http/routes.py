"""The routes of the native dialect, and those that watch: health, readiness, metrics.

A handler says what is asked and how it is answered; the order of things is in `answering.py`, rules are in `intake.py`,
naming a stored request in `resume.py`, what OpenAPI says of it all in `openapi.py`.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import InvalidRequest, Unavailable
from service.http.answering import Answering, Order
from service.http.backend import Backend
from service.http.body import check
from service.http.intake import Asked, Intake, Served
from service.http.openapi import CANCEL, GENERATE, READ, problems
from service.http.reply import Native
from service.http.resume import reading
from service.http.schemas import ALLOWED, GenerateRequest
from service.metrics import Metrics


class Routes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics
        self._answering = Answering(backend, metrics)

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add, stored_url = router.add_api_route, "/generate/{id}"
        add("/generate", self.generate, methods=["POST"], summary="Continue a prompt", **GENERATE)
        add(stored_url, self.read, methods=["GET"], summary="Read a request, from any position", **READ)
        add(stored_url, self.cancel, methods=["DELETE"], summary="Cancel a request, wherever it is", **CANCEL)
        add("/health", self.health, summary="Alive: 200 as long as the process answers")
        add("/ready", self.ready, summary="Ready to serve: 200, or 503 and why", responses=problems(503))
        add("/metrics", self.metrics, summary="Prometheus metrics", response_class=Response)
        return router

    async def generate(self, request: Request) -> Response:
        """Answer with JSON, with a stream of events if `stream` is true, or at once with where to read if `background`
        is. Refusals always have their own status."""
        return await self._answering.answer(request, _order)

    async def read(self, request: Request, id: str) -> Response:
        """The events of a stored request after those that the client has, or all of it. To leave ends nothing."""
        return await self._answering.read(request, id, lambda intake: reading(request, intake), _native)

    async def cancel(self, request: Request, id: str) -> Response:
        """Wherever it is."""
        await self._answering.cancel(request, id)
        return JSONResponse({"id": id, "status": "cancelling"}, 202)

    async def health(self) -> Response:
        """Says nothing of the model: a loading or draining process is alive."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """For load balancers."""
        reason = self._backend.ready()
        if reason is not None:
            raise Unavailable(reason)
        return JSONResponse({"status": "ready", **self._backend.facts()})

    async def metrics(self, request: Request) -> Response:
        """In the Prometheus text format, or as OpenMetrics for who accepts that."""
        told, media_type = await exposition(self._backend, self._metrics, request.headers.get("accept", ""))
        return Response(told, media_type=media_type)


async def exposition(backend: Backend, metrics: Metrics, accept: str = "") -> tuple[bytes, str]:
    """All metrics and their media type. The queue is asked now; everything else was counted when it happened."""
    metrics.ready.set(backend.ready() is None)
    if backend.broker is not None:
        try:
            books = await backend.broker.books()
            metrics.line.see(
                books.num_waiting, books.num_running, books.oldest_wait_s, books.num_accepted, books.num_ended
            )
        except Unavailable:  # what else there is must be seen then more than ever
            metrics.line.lose()
    return metrics.exposition(accept)


def _order(data: object, served: Served) -> Order:
    body = check(GenerateRequest, data, ALLOWED)
    if body.background and body.stream:
        raise InvalidRequest("background", True, "false where `stream` is true: there is nobody to stream to")
    if body.progress and not body.stream:
        raise InvalidRequest("progress", True, "false where `stream` is not true: it is told in streams only")
    return Order(Asked(body), _native)


def _native(intake: Intake, served: Served) -> Native:
    return Native(intake, served.tokenizer)
