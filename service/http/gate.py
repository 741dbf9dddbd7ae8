"""Who may come in: the hosts that are answered for, the pages of others that may ask, keys, and what each key may do.

Everything is closed but for what is listed here, and decided by the very path that the router goes by, the scope's,
never by a URL that was put together from headers. It knows no route beyond the open ones, no body and no queue.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import MillraceError
from service.http.answering import CLIENT
from service.http.intake import Client
from service.http.limits import VISIT, Accounts, Visit
from service.http.openai_errors import refused
from service.http.problems import HttpRefusal
from service.keys import Keyring
from service.metrics import Metrics

PAGE_PREFIX = "/page/"  # files of the chat page
METRICS = "/metrics"
WATCHED = frozenset({"/health", "/ready"})  # by load balancers, who call a process by its address
OPEN = WATCHED | {"/", "/docs", "/docs/docs.js", "/docs/docs.css"}  # without a key; nothing of it differs by who asks
HOST = re.compile(rb"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
TOKENS = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+){0,63}")
METHODS = b"GET, HEAD, POST, DELETE"
EXPOSED = (
    b"x-request-id, retry-after, location, content-location, x-millrace-ignored, x-ratelimit-limit-requests, "
    b"x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    b"x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Rules:
    """`hosts` are names without a port, or with one that then counts; none is any. `origins` are those of pages
    elsewhere, as browsers write them. Without a keyring everybody is the same tenant and no key is looked at."""

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keyring: Keyring | None = None


class Gate:
    """ASGI, before everything that reads a request."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._keyring, self._metrics = app, rules.keyring, metrics
        self._hosts = frozenset(host.lower().encode() for host in rules.hosts)
        self._origins = frozenset(origin.lower().encode() for origin in rules.origins)
        self._accounts = Accounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or refuse in the words of the route."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # nothing else is spoken here
        origin, visit = _one(scope["headers"], b"origin").lower(), None
        try:
            self._check_host(scope, origin)
            if scope["method"] == "OPTIONS" and origin in self._origins:
                await _preflight(scope, origin)(scope, receive, send)
                return
            scope, visit = self._let_in(scope)
        except MillraceError as error:
            self._metrics.refused(error.code)
            await refused(scope["path"], error)(scope, receive, self._telling(send, origin, None))
            return
        try:
            await self._app(scope, receive, self._telling(send, origin, visit))
        finally:
            if visit is not None:
                visit.leave()

    def _check_host(self, scope: Scope, origin: bytes) -> None:
        """Against pages of others: one that has its own name point here, and one that simply asks."""
        if scope["path"] in WATCHED:
            return
        given = [value for name, value in scope["headers"] if name == b"host"]
        match = HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise HttpRefusal("bad_request", "the request needs one Host header: a name, and a port if there is one")
        host = given[0].lower()
        if self._hosts and not self._hosts & {host, match[1].lower()}:
            raise HttpRefusal("forbidden", "this server does not answer for that host; see --allowed-hosts")
        if origin and origin not in self._origins and origin.partition(b"://")[2] != host:
            raise HttpRefusal("forbidden", "pages of that origin may not ask here; see --cors-origin")

    def _let_in(self, scope: Scope) -> tuple[Scope, Visit | None]:
        """The scope with who asks. Raises `HttpRefusal`."""
        path = scope["path"]
        if self._keyring is None or path in OPEN or path.startswith(PAGE_PREFIX):
            return scope, None
        key = _key(scope["headers"])
        tenant = self._keyring.tenant(key) if key else None
        if tenant is None:
            known = "this key is not known here" if key else "this server asks for a key"
            raise HttpRefusal(
                "invalid_api_key", f"{known}; send it as Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )
        if path == METRICS:  # they tell of everybody
            raise HttpRefusal("not_found", "metrics are on a port of their own")
        visit = Visit(self._accounts.of(tenant))
        client: Client = scope.get(CLIENT) or Client()
        return {**scope, CLIENT: replace(client, tenant=tenant.name), VISIT: visit}, visit

    def _telling(self, send: Send, origin: bytes, visit: Visit | None) -> Send:
        """`send`, with the headers that go with every response."""
        shared = _cors(origin) if origin in self._origins else [(b"vary", b"Origin")] if self._origins else []
        if not shared and visit is None:
            return send

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = visit.headers() if visit is not None else []
                message = {**message, "headers": [*message["headers"], *shared, *own]}
            await send(message)

        return tell


def _one(headers: Headers, wanted: bytes) -> bytes:
    """The header of that name; b"" if there is none, and what nothing equals if there are several."""
    found = [value for name, value in headers if name == wanted]
    return found[0] if len(found) == 1 else b"\0" if found else b""


def _key(headers: Headers) -> bytes:
    """What came as a key, b"" for nothing that could be one."""
    scheme, _, key = _one(headers, b"authorization").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else _one(headers, b"x-api-key")


def _cors(origin: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", EXPOSED),
        (b"vary", b"Origin"),
    ]


def _preflight(scope: Scope, origin: bytes) -> Response:
    """A browser asks before it asks: it names the headers that a page of this origin wants to send."""
    wanted = _one(scope["headers"], b"access-control-request-headers")
    response = Response(status_code=204)
    response.raw_headers += [
        *_cors(origin),
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"600"),
    ]
    if TOKENS.fullmatch(wanted):
        response.raw_headers.append((b"access-control-allow-headers", wanted))
    return response
