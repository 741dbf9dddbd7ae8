"""The routes of those who watch: health, readiness, metrics."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import Unavailable
from service.http.backend import Backend
from service.http.openapi import problems
from service.metrics import Metrics


class WatchRoutes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add = router.add_api_route
        add("/health", self.health, summary="Alive: 200 as long as the process answers")
        add("/ready", self.ready, summary="Ready to serve: 200, or 503 and why", responses=problems(503))
        add("/metrics", self.metrics, summary="Prometheus metrics", response_class=Response)
        return router

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
