"""Metrics on a port of their own: of a process without HTTP, or with HTTP that is open to people who should not see
them.

A part of the composition root. It knows no metric.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.listen import Server, bind
from service.settings import Settings

MAX_CONNECTIONS, PATIENCE_S = 32, 1


@asynccontextmanager
async def scraped(settings: Settings, exposition: Callable[[], Awaitable[bytes]]) -> AsyncIterator[None]:
    """Answer `GET /metrics`, if the settings have a port for it. Raises `StartupError`."""
    if settings.metrics_port is None:
        yield
        return

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            response = Response(await exposition(), media_type=CONTENT_TYPE_LATEST)
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
