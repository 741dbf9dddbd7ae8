"""The HTTP half of a process: its port, its server, its signals, and the order of its end.

A part of the composition root, shared by the commands that listen. It knows neither engine nor queue.
"""

import asyncio
import errno
import gc
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any

import uvicorn

from model.families.registry import read_config, read_generation_defaults
from model.tokenizer import Tokenizer
from service.errors import StartupError
from service.http.app import create_app
from service.http.backend import Backend
from service.http.intake import Served
from service.metrics import Metrics
from service.settings import BUNDLED, Settings

LAST_BYTES_S = 5  # for connections to take what was written to them
STOPPING = "the server is shutting down"


def spare_the_collector() -> None:
    """What has been loaded stays, so the garbage collector need not look at it again; and what a stream makes is freed
    by counting references, so it may come seldom. It took an eighth of the time at a thousand streams."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before anything slow: a used port is told at once. Raises `StartupError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = f"stop what listens there (see: lsof -i :{port}) or use another: --port {port + 1}"
            raise StartupError(f"port {port} of {host} is in use; {fix}") from error
        raise StartupError(f"can't listen on {host}:{port}: {error.strerror}; choose --host and --port") from error
    return listener


def served(settings: Settings, tokenizer: Tokenizer, max_model_len: int) -> Served:
    """The model of the settings' folder as the HTTP half needs to know it. Raises `CheckpointError`."""
    folder = settings.model or BUNDLED
    config = read_config(folder)
    return Served(
        name=settings.served_name,
        tokenizer=tokenizer,
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        eos_ids=config.eos_ids,
        defaults=read_generation_defaults(folder),
        created=int(time.time()),
        orphan_s=settings.orphan_s,
        max_request_s=settings.max_request_s,
    )


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: it would cut streams and end by the signal instead of with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def close_port(self) -> None:
        """Take no new connections; those that are open go on."""
        for server in self.servers:
            server.close()


class Door:
    """A backend, and the server before it. `watch`, `refuse` and `facts` are the backend's; once `stopping` is set,
    they are not asked any more. `hurried` is set by a second signal: wait for nothing."""

    def __init__(
        self,
        listener: socket.socket,
        watch: Callable[[], str | None],
        refuse: Callable[[], str | None] | None = None,
        facts: Callable[[], dict[str, object]] = dict,
    ) -> None:
        def unless_stopping(reason: Callable[[], str | None]) -> Callable[[], str | None]:
            return lambda: STOPPING if self.stopping.is_set() else reason()

        self.stopping, self.hurried = asyncio.Event(), asyncio.Event()
        self.metrics = Metrics(version("millrace"))
        self.backend = Backend(unless_stopping(watch), unless_stopping(refuse or watch), facts)
        self._listener = listener
        self._host, self._port = listener.getsockname()[:2]
        self._server = Server(
            uvicorn.Config(
                create_app(self.backend, self.metrics, version("millrace")),
                log_config=None,
                log_level="warning",  # its comings and goings say nothing that our lines don't
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=LAST_BYTES_S,
            )
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[asyncio.Task[None]]:
        """Answer, with 503 until the backend is loaded. On the way out what was written still gets to its readers. The
        task ends earlier only if the server breaks."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        try:
            yield serving
        finally:
            self._server.should_exit = True
            await serving

    def heed_signals(self) -> None:
        """All is loaded. From now on SIGTERM and SIGINT set `stopping`, and then `hurried`."""
        spare_the_collector()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, self._on_signal)

    async def until_told(self, *others: "asyncio.Task[Any]") -> None:
        """Until `stopping` is set or one of the tasks has ended. From then on the port is closed and every new request
        refused; what is open goes on."""
        told = asyncio.create_task(self.stopping.wait())
        await asyncio.wait({told, *others}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        self.stopping.set()
        self._server.close_port()

    @property
    def num_open(self) -> int:
        """Requests being answered."""
        return len(self._server.server_state.tasks)

    def invitation(self) -> str:
        """The last line of a start: where it listens, and something to type."""
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::") else self._host
        url = f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"
        body = '{"prompt": "Once upon a time", "stream": true}'
        return f"url     {url}   try: curl -N {url}/generate -H 'content-type: application/json' -d '{body}'"

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            self.hurried.set()
        self.stopping.set()
