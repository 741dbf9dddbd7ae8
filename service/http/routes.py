"""The routes of the native dialect, and those that watch: health, readiness, metrics, models.

A handler reads, asks and shapes; rules are in `intake.py`, the life of a request in `generation.py`.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.broker.base import RequestSide
from service.errors import MillraceError, Overloaded, Unavailable
from service.http.body import check, read_json
from service.http.generation import Generation, Piece
from service.http.intake import Served, take_in
from service.http.problems import MEDIA_TYPE, PROBLEMS, problem_response
from service.http.reply import Native
from service.http.schemas import ALLOWED, GenerateAnswer, GenerateRequest, Problem
from service.http.sse import EventStream
from service.metrics import Metrics

LOADING = "loading"
CLIENT_GONE = 499  # nobody reads it; it is for the access log


class Backend:
    """What stands behind the door: nothing while the model loads, then a model and a broker.

    `watch` says why no request should come now (draining, stuck), or None. The composition root owns this object.
    """

    def __init__(self, watch: Callable[[], str | None] = lambda: None) -> None:
        self.served: Served | None = None
        self.broker: RequestSide | None = None
        self._watch = watch

    def loaded(self, served: Served, broker: RequestSide) -> None:
        """From now on requests are served."""
        self.served, self.broker = served, broker

    def ready(self) -> str | None:
        """None, or the reason why not."""
        return LOADING if self.served is None else self._watch()

    def get(self) -> tuple[Served, RequestSide]:
        """Raises `Unavailable` if it isn't ready."""
        reason = self.ready()
        if reason is not None or self.served is None or self.broker is None:
            raise Unavailable(reason or LOADING)
        return self.served, self.broker


class Routes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        router.add_api_route(
            "/generate", self.generate, methods=["POST"], summary="Continue a prompt", **_generate_docs()
        )
        router.add_api_route("/v1/models", self.models, summary="The served model")
        router.add_api_route("/health", self.health, summary="Alive: 200 as long as the process answers")
        router.add_api_route(
            "/ready", self.ready, summary="Ready to serve: 200, or 503 and why", responses=_problems(503)
        )
        router.add_api_route("/metrics", self.metrics, summary="Prometheus metrics", response_class=Response)
        return router

    async def generate(self, request: Request) -> Response:
        """Answer with JSON, or with a stream of events if `stream` is true. Refusals always have their own status."""
        arrived_s = time.monotonic()
        try:
            served, broker = self._backend.get()
            body = check(GenerateRequest, await read_json(request), ALLOWED)
            load = await broker.load()
            if load.full:
                raise Overloaded(load.retry_after_s, load.num_waiting)
            intake = await take_in(body, served)
            generation = Generation(intake, served, broker, self._metrics, arrived_s)
            await generation.submit()
        except MillraceError as error:
            self._metrics.refused(error.code)
            raise
        dialect = Native(intake, served.tokenizer)
        return EventStream(generation, dialect) if body.stream else await whole(request, generation, dialect)

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
        self._backend.get()
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """The queue is asked now; everything else was counted when it happened."""
        if self._backend.broker is not None:
            load = await self._backend.broker.load()
            self._metrics.on_load(load.num_waiting, load.num_running)
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def whole(request: Request, generation: Generation, dialect: Native) -> Response:
    """The answer in one piece; a client that leaves before it is there has stopped its generation."""
    answer = asyncio.create_task(_answer(generation, dialect))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_GONE)
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        await generation.close()


async def _answer(generation: Generation, dialect: Native) -> Response:
    pieces: list[Piece] = []
    try:
        async for batch in generation.pieces():
            pieces += batch
    except Exception as error:
        generation.fail(error)
    failure = generation.error()
    if failure is not None:
        return problem_response(MillraceError(failure))
    return Response(dialect.whole(generation, pieces), media_type="application/json")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI's responses for these statuses; a description begins with the problem's code."""
    schema = Problem.model_json_schema()
    told: dict[int | str, dict[str, object]] = {}
    for status in statuses:
        about = ". ".join(f"{code}: {title}" for code, (of, title) in PROBLEMS.items() if of == status)
        told[status] = {"description": about, "content": {MEDIA_TYPE: {"schema": schema}}}
    return told


def _generate_docs() -> dict[str, Any]:
    schema = GenerateRequest.model_json_schema()
    return {
        "response_class": Response,
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        "responses": {
            200: {
                "model": GenerateAnswer,
                "description": "The answer, or its events",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **_problems(400, 404, 413, 415, 422, 429, 500, 503),
        },
    }
