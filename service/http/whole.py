"""Answers in one piece: all of a generation at once, or only where to find it. A stream is `sse.py`'s."""

import asyncio

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.errors import Handover, Unavailable
from service.http.generation import Generation, Piece
from service.http.intake import Intake
from service.http.problems import HANDOVER_RETRY_S
from service.http.reply import Dialect

CLIENT_GONE = 499  # nobody reads it; it is for the access log


def submitted(intake: Intake) -> Response:
    """For a request that needs no reader: 202 and where it can be read."""
    url = f"/generate/{intake.id}"
    about = {"id": intake.id, "url": url, "model": intake.model, "created": intake.created, "seed": intake.seed}
    return Response(orjson.dumps(about), 202, {"Location": url}, "application/json")


async def whole(request: Request, generation: Generation, dialect: Dialect) -> Response:
    """The answer, once it is there. The generation is closed, whether the client has waited for that or not."""
    answer = asyncio.create_task(_answer(generation, dialect))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_GONE)
    except asyncio.CancelledError:  # by the server
        generation.hand_over()
        raise
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        await generation.close()


async def _answer(generation: Generation, dialect: Dialect) -> Response:
    pieces: list[Piece] = []
    try:
        async for batch in generation.pieces():
            pieces += batch
    except Handover as handover:
        generation.hand_over()
        return dialect.refusal(Unavailable(f"{handover}: {generation.intake.id}", HANDOVER_RETRY_S))
    except Exception as error:
        generation.fail(error)
    failure = dialect.failure(generation)
    if failure is not None:
        return dialect.refusal(failure)
    return Response(dialect.whole(generation, pieces), media_type="application/json")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
