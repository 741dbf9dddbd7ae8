"""The routes of OpenAI's Responses: create, read at once or as a stream from any event on, cancel.

The order of things is in `answering.py`, rules are in `responses_asked.py` and `intake.py`, words in
`responses_reply.py`. What is stored is the log, so any process can answer.
"""

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, RequestNotFound
from service.http.answering import Answering, Order
from service.http.backend import Backend
from service.http.generation import Generation, Piece
from service.http.intake import Intake, Served
from service.http.responses_asked import RESPONSE, Told, response
from service.http.responses_openapi import CANCEL, CREATE, READ
from service.http.responses_reply import Responses
from service.http.resume import COUNT, switch
from service.http.schemas import MAX_COUNT
from service.http.stored import Stored
from service.metrics import Metrics

AFTER, STREAM = "starting_after", "stream"  # query parameters
ALLOWED_AFTER = f"a sequence number from 0 to {MAX_COUNT}, with stream=true"


class ResponsesRoutes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._answering, self._stored = Answering(backend, metrics), Stored(backend, metrics)

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add, path = router.add_api_route, "/v1/responses"
        add(path, self.create, methods=["POST"], summary="Answer an input", **CREATE)
        add(path + "/{id}", self.read, methods=["GET"], summary="A response as it is now, or its events", **READ)
        add(path + "/{id}/cancel", self.cancel, methods=["POST"], summary="Cancel a response", **CANCEL)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with the response once it is there, with its events if `stream` is true, or at once with where it
        stands if `background` is. Refusals always have their own status."""
        return await self._answering.answer(request, _order)

    async def read(self, request: Request, id: str) -> Response:
        """Where it stands, without waiting, or the events after the one that the client has. To leave ends nothing."""
        _check_id(id)
        after = _after(request)
        if after is None:
            return await self._stored.glance(request, id, _now)
        return await self._stored.read(
            request, id, _from_the_start, lambda intake, served: Responses(intake, served.tokenizer, after)
        )

    async def cancel(self, request: Request, id: str) -> Response:
        """Wherever it is. One that has ended stays as it is."""
        _check_id(id)
        await self._stored.cancel(request, id)
        return await self._stored.glance(request, id, _cancelled)


def _order(data: object, served: Served) -> Order:
    asked, headers = response(data)

    def submitted(intake: Intake) -> Response:
        queued = Responses(intake, served.tokenizer).object("queued", None)
        return Response(orjson.dumps(queued), media_type="application/json")

    return Order(asked, _speak, submitted, headers)


def _speak(intake: Intake, served: Served) -> Responses:
    return Responses(intake, served.tokenizer)


def _now(generation: Generation, served: Served, pieces: list[Piece], waits: bool) -> bytes:
    _check_stored(generation.intake)
    return Responses(generation.intake, served.tokenizer).now(generation, pieces, waits)


def _cancelled(generation: Generation, served: Served, pieces: list[Piece], waits: bool) -> bytes:
    return Responses(generation.intake, served.tokenizer).now(generation, pieces, waits, cancelled=True)


def _from_the_start(intake: Intake) -> tuple[int, ...]:
    """The tokens that are told to the dialect, which knows what of them its reader has."""
    _check_stored(intake)
    return (0,)


def _after(request: Request) -> int | None:
    """The number of the last event that the client has, -1 for none; None if it wants no events. Raises
    `InvalidRequest`."""
    given, streamed = request.query_params.getlist(AFTER), switch(request, STREAM)
    if not given:
        return -1 if streamed else None
    text = ",".join(given)
    if not streamed or not COUNT.fullmatch(text) or int(text) > MAX_COUNT:
        raise InvalidRequest(AFTER, text, ALLOWED_AFTER)
    return int(text)


def _check_id(id: str) -> None:
    """Raises `RequestNotFound` for one that another route has made: it can't be told in this one's words."""
    if not id.startswith(RESPONSE):
        raise RequestNotFound(f"no request {id[:80]} was made by this route; its ids begin with {RESPONSE}")


def _check_stored(intake: Intake) -> None:
    if not Told.of(intake.group[0].about).store:
        raise RequestNotFound(f"request {intake.id} was not to be stored")
