"""The door as an ASGI application: routes, errors in each route's words, request ids, HEAD, and the pages.

It starts with nothing loaded, so that the port can be bound first; `Backend.loaded` opens it. It holds no rules of its
own about requests.
"""

import logging
import re
import secrets

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import MillraceError
from service.http.answering import CLIENT
from service.http.attention_routes import AttentionRoutes
from service.http.backend import Backend
from service.http.gate import Gate, Rules
from service.http.intake import Client
from service.http.openai_errors import refused
from service.http.openai_routes import OpenAIRoutes
from service.http.pages import add_pages
from service.http.problems import HttpRefusal
from service.http.responses_routes import ResponsesRoutes
from service.http.routes import Routes
from service.http.sse import HEAD, SEND
from service.http.text_routes import TextRoutes
from service.http.vector_routes import VectorRoutes
from service.http.watching import WatchRoutes
from service.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, 3.2
ANYBODY = Rules()
CODES = {404: "not_found", 405: "method_not_allowed"}

logger = logging.getLogger(__name__)


def create_app(backend: Backend, metrics: Metrics, version: str = "0", rules: Rules = ANYBODY) -> FastAPI:
    """The application over a backend that may still be empty; `rules` say who may come in."""
    app = FastAPI(
        title="Millrace",
        version=version,
        summary="Text generation, streamed.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(Routes(backend, metrics).router())
    app.include_router(OpenAIRoutes(backend, metrics).router())
    app.include_router(ResponsesRoutes(backend, metrics).router())
    app.include_router(TextRoutes(backend).router())
    app.include_router(VectorRoutes(backend, metrics).router())
    app.include_router(AttentionRoutes(backend).router())
    app.include_router(WatchRoutes(backend, metrics).router())
    add_pages(app)
    app.add_exception_handler(MillraceError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Gate, rules=rules, metrics=metrics)
    app.add_middleware(Edge)
    return app


class Edge:
    """Outermost: every response has its `x-request-id`, HEAD is GET without the body, and no exception gets past.

    Plain ASGI, since wrapping classes of the framework would stand between a stream and its client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; what was raised is logged here and told as nothing but a 500."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _header(scope, b"x-request-id", REQUEST_ID) or secrets.token_hex(16).encode()
        traceparent = _header(scope, b"traceparent", TRACEPARENT)
        scope = {**scope, SEND: send, CLIENT: Client(request_id=request_id.decode(), traceparent=traceparent.decode())}
        is_head, started = scope["method"] == "HEAD", False

        async def send_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app({**scope, "method": "GET", HEAD: True} if is_head else scope, receive, send_on)
        except ClientDisconnect:
            logger.debug("request %s: the client left while sending", request_id.decode())
        except Exception as error:
            logger.error("request %s broke", request_id.decode(), exc_info=error)
            if not started:
                await refused(scope["path"], MillraceError("internal error"))(scope, receive, send_on)


def _header(scope: Scope, wanted: bytes, form: re.Pattern[bytes]) -> bytes:
    """The first of that name and form, or b""."""
    for name, value in scope["headers"]:
        if name == wanted and form.fullmatch(value):
            return bytes(value)
    return b""


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MillraceError)
    return refused(request.scope["path"], error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: routes and methods that don't exist."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, MillraceError.code)
    detail = f"{request.method[:16]} is not taken here" if code == "method_not_allowed" else "see /docs for the routes"
    return refused(request.scope["path"], HttpRefusal(code, detail, dict(error.headers or {})))
