"""Metrics on a port of their own: of a process without HTTP, or with HTTP that is open to people who should not see
them.

A part of the composition root. It knows no metric.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.listen import Server, bind
from service.settings import Settings

MAX_CONNECTIONS, PATIENCE_S = 32, 1


@asynccontextmanager
async def scraped(settings: Settings, exposition: Callable[[str], Awaitable[tuple[bytes, str]]]) -> AsyncIterator[None]:
    """Answer `GET /metrics`, if the settings have a port for it: `exposition` makes text and media type of an Accept
    header. Raises `StartupError`."""
    if settings.metrics_port is None:
        yield
        return

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            told, media_type = await exposition(Headers(scope=scope).get("accept", ""))
            response = Response(told, media_type=media_type)
        else:
            response = Response(status_code=404)
        await response(scope, receive, send)

    server = Server(answer, MAX_CONNECTIONS, PATIENCE_S)
    serving = asyncio.create_task(server.serve([bind(settings.metrics_host, settings.metrics_port, "--metrics-port")]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
