"""Ports: how one is bound, with what its connections inherit, and a server on it that leaves signals alone.

A part of the composition root. It knows no application.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from service.errors import StartupError
from service.http.protocol import limited

SOCKET_OPTIONS = (  # what is accepted has them from the listener
    ("SOL_SOCKET", "SO_KEEPALIVE", 1),
    ("IPPROTO_TCP", "TCP_KEEPIDLE", 20),  # s
    ("IPPROTO_TCP", "TCP_KEEPINTVL", 5),  # s
    ("IPPROTO_TCP", "TCP_KEEPCNT", 3),
    ("IPPROTO_TCP", "TCP_USER_TIMEOUT", 20_000),  # ms that a peer may leave unanswered; otherwise a quarter of an hour
    ("SOL_SOCKET", "SO_SNDBUF", 128 * 2**10),  # the kernel would take 4 MiB for a client that reads nothing
)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """The listening socket, before anything slow: a used port is told at once, with the flag to change it. Raises
    `StartupError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, name, value in SOCKET_OPTIONS:
            if hasattr(socket, name):  # not every system has all of them
                listener.setsockopt(getattr(socket, level), getattr(socket, name), value)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = f"stop what listens there (see: lsof -i :{port}) or use another: {flag} {port + 1}"
            raise StartupError(f"port {port} of {host} is in use; {fix}") from error
        raise StartupError(
            f"can't listen on {host}:{port}: {error.strerror}; choose {flag} and {flag.replace('port', 'host')}"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: it would cut streams and end by the signal instead of with 0. `app` is
    ASGI; when it is to stop it waits `patience_s` for its connections to take what was written."""

    def __init__(self, app: Any, max_connections: int, patience_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited(max_connections),
                log_config=None,
                log_level="warning",  # its comings and goings say nothing that our lines don't
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=patience_s,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def close_port(self) -> None:
        """Take no new connections; those that are open go on."""
        for server in self.servers:
            server.close()
