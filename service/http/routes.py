"""The routes of the native dialect.

A handler says what is asked and how it is answered; the order of things is in `answering.py`, rules are in `intake.py`,
naming a stored request in `resume.py`, what OpenAPI says of it all in `openapi.py`.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import InvalidRequest
from service.http.answering import Answering, Order
from service.http.backend import Backend
from service.http.body import check
from service.http.intake import Asked, Intake, Served
from service.http.openapi import CANCEL, GENERATE, READ
from service.http.reply import Native
from service.http.resume import reading
from service.http.schemas import ALLOWED, GenerateRequest
from service.http.stored import Stored
from service.metrics import Metrics


class Routes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._answering, self._stored = Answering(backend, metrics), Stored(backend, metrics)

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add, stored_url = router.add_api_route, "/generate/{id}"
        add("/generate", self.generate, methods=["POST"], summary="Continue a prompt", **GENERATE)
        add(stored_url, self.read, methods=["GET"], summary="Read a request, from any position", **READ)
        add(stored_url, self.cancel, methods=["DELETE"], summary="Cancel a request, wherever it is", **CANCEL)
        return router

    async def generate(self, request: Request) -> Response:
        """Answer with JSON, with a stream of events if `stream` is true, or at once with where to read if `background`
        is. Refusals always have their own status."""
        return await self._answering.answer(request, _order)

    async def read(self, request: Request, id: str) -> Response:
        """The events of a stored request after those that the client has, or all of it. To leave ends nothing."""
        return await self._stored.read(request, id, lambda intake: reading(request, intake), _native)

    async def cancel(self, request: Request, id: str) -> Response:
        """Wherever it is."""
        await self._stored.cancel(request, id)
        return JSONResponse({"id": id, "status": "cancelling"}, 202)


def _order(data: object, served: Served) -> Order:
    body = check(GenerateRequest, data, ALLOWED)
    if body.background and body.stream:
        raise InvalidRequest("background", True, "false where `stream` is true: there is nobody to stream to")
    if body.progress and not body.stream:
        raise InvalidRequest("progress", True, "false where `stream` is not true: it is told in streams only")
    return Order(Asked(body), _native)


def _native(intake: Intake, served: Served) -> Native:
    return Native(intake, served.tokenizer)
