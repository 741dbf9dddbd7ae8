"""The files of the two pages, the chat page at `/` and the documentation at `/docs`: read once, compressed once, served
from memory with what a browser must not be allowed to do.

It knows file names and headers. What is served is listed at the start: no path of a client's reaches the disk.
"""

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
CHAT, DOCS = "chat.html", "docs.html"  # every other file is a part of one of them
CSP = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Markup becomes part of a page only through the sanitiser, which makes this policy.
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time: the parts of one page must be of one version
    "Vary": "Accept-Encoding",
}


def add_pages(app: FastAPI) -> None:
    """The routes: `/`, `/page/<file>`, `/docs`, `/docs/<file>`."""
    add = app.add_api_route
    for path in sorted(FOLDER.iterdir()):
        route = f"/docs/{path.name}" if path.stem == "docs" else f"/page/{path.name}"
        add({CHAT: "/", DOCS: "/docs"}.get(path.name, route), _page(path), include_in_schema=False)


def _page(path: Path) -> Callable[[Request], Awaitable[Response]]:
    body, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]
    small = gzip.compress(body, mtime=0)
    tag = f'W/"{hashlib.sha256(body).hexdigest()[:16]}"'  # weak: the same for both encodings

    async def page(request: Request) -> Response:
        headers = HEADERS | {"ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(body, media_type=media_type, headers=headers)
        return Response(small, media_type=media_type, headers=headers | {"Content-Encoding": "gzip"})

    return page
