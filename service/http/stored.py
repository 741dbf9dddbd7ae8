"""What is asked of a request that was submitted before: to read it again, to see how it stands, to cancel it.

Whoever knows its id and is of its tenant may ask, of any process. It knows neither field names nor shapes: a route
brings those along.
"""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from service.broker.base import RequestSide
from service.errors import RequestNotFound
from service.http.answering import Speak, client_of, refusals
from service.http.backend import Backend
from service.http.generation import Generation, Piece
from service.http.intake import Intake, Served
from service.http.resume import check_id, stored, wants_progress
from service.http.sse import HEAD, EventStream
from service.http.whole import whole
from service.metrics import Metrics

Tell = Callable[[Generation, Served, list[Piece], bool], bytes]  # of what has come so far, and whether it still waits


class Stored:
    """Over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    async def read(
        self, request: Request, id: str, after: Callable[[Intake], tuple[int, ...] | None], speak: Speak
    ) -> Response:
        """A stored request again: the events after those that the client has, or for None all of it in one piece. To
        leave ends nothing."""
        with refusals(self._metrics, client_of(request)):
            served, broker = self._backend.get()
            intake = _written(await stored(broker, id, client_of(request).tenant, served))
            counts, with_progress = after(intake), wants_progress(request)
        if request.scope.get(HEAD) and counts is None:  # it would wait for the answer
            return Response(media_type="application/json")
        if not request.scope.get(HEAD):
            self._metrics.resumed.inc()
        generation = Generation(intake, served, broker, self._metrics, counts or ())
        dialect = speak(intake, served)
        if counts is None:
            return await whole(request, generation, dialect)
        return EventStream(generation, dialect, with_progress=with_progress)

    async def glance(self, request: Request, id: str, tell: Tell) -> Response:
        """A stored request as it is now. Told also while this process serves others no more: it costs little."""
        with refusals(self._metrics, client_of(request)):
            served, broker = self._backend.open()
            intake = _written(await stored(broker, id, client_of(request).tenant, served))
            generation = Generation(intake, served, broker, self._metrics)
            pieces, waits = await generation.glance()
            return Response(tell(generation, served, pieces, waits), media_type="application/json")

    async def cancel(self, request: Request, id: str) -> None:
        """Taken on while this process serves others no more, for it makes room."""
        with refusals(self._metrics, client_of(request)):
            _, broker = self._backend.open()
            await cancel_group(broker, id, client_of(request).tenant)


async def cancel_group(broker: RequestSide, id: str, tenant: str) -> None:
    """All sequences of a request. Raises `RequestNotFound` and `Unavailable`."""
    for child in await broker.lookup(check_id(id), tenant):
        await broker.cancel(child.id, tenant)


def _written(intake: Intake) -> Intake:
    """Raises `RequestNotFound` for one that has no text to be read."""
    if intake.group[0].task != "generate":
        raise RequestNotFound(f"request {intake.id} is answered once, where it is asked")
    return intake
