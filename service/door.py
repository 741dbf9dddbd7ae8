"""The HTTP half of a process: its port, its server, its signals, and the order of its end.

A part of the composition root, shared by the commands that listen. It knows neither engine nor queue.
"""

import asyncio
import gc
import ipaddress
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from model.families.registry import read_config, read_generation_defaults
from model.tokenizer import Tokenizer
from service.errors import StartupError
from service.http.app import create_app
from service.http.backend import Backend
from service.http.gate import Rules
from service.http.intake import Served
from service.http.watching import exposition
from service.keys import Keyring
from service.listen import Server
from service.metrics import Metrics
from service.scrape import scraped
from service.settings import BUNDLED, Settings
from service.traces import Traces

LAST_BYTES_S = 5  # for connections to take what was written to them
OTHER_FILES = 128  # that a process may have open beside its connections
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
STOPPING = "the server is shutting down"

logger = logging.getLogger(__name__)


def spare_the_collector() -> None:
    """What has been loaded stays, so the garbage collector need not look at it again; and what a stream makes is freed
    by counting references, so it may come seldom. It took an eighth of the time at a thousand streams."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


def rules(settings: Settings) -> Rules:
    """Who may come in. Without keys that is this machine. Raises `StartupError`."""
    host, file = settings.host, settings.api_keys_file
    if file is None and not _is_loopback(host) and not settings.insecure_no_auth:
        fix = "give --api-keys-file (see: millrace keys add --help), or --insecure-no-auth if others see to that"
        raise StartupError(f"--host {host} would let anybody in, for there are no keys: {fix}")
    hosts = settings.allowed_hosts
    if not hosts and _is_loopback(host):
        hosts = (*LOOPBACK, f"[{host}]" if ":" in host else host)
    return Rules(hosts, settings.cors_origin, None if file is None else Keyring(file))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_room(num_connections: int) -> None:
    """Files that may be open: many systems start a process with 1024, which connections alone would use up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


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
        start_id=config.start_id,
        searches=config.searches,
        tasks=config.tasks,
        labels=config.labels,
        hidden_size=config.hidden_size,
        pooling=config.pooling,
    )


class Door:
    """A backend, and the server before it, as the settings have it. `watch`, `refuse` and `facts` are the backend's;
    once `stopping` is set, they are not asked any more. `hurried` is set by a second signal: wait for nothing."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        watch: Callable[[], str | None],
        refuse: Callable[[], str | None] | None = None,
        facts: Callable[[], dict[str, object]] = dict,
    ) -> None:
        def unless_stopping(reason: Callable[[], str | None]) -> Callable[[], str | None]:
            return lambda: STOPPING if self.stopping.is_set() else reason()

        self.stopping, self.hurried = asyncio.Event(), asyncio.Event()
        self.metrics = Metrics(version("millrace"))
        self.metrics.draining.set_function(self.stopping.is_set)
        self.backend = Backend(unless_stopping(watch), unless_stopping(refuse or watch), facts)
        if settings.otlp_endpoint is not None:
            self.backend.traces = Traces(settings.otlp_endpoint, "millrace-api", version("millrace"))
        self.rules, self._listener = rules(settings), listener
        _make_room(settings.max_connections)
        self._host, self._port = listener.getsockname()[:2]
        app = create_app(self.backend, self.metrics, version("millrace"), self.rules)
        self._server, self._settings = Server(app, settings.max_connections, LAST_BYTES_S), settings

    @asynccontextmanager
    async def open(self) -> AsyncIterator[asyncio.Task[None]]:
        """Answer, with 503 until the backend is loaded. On the way out what was written still gets to its readers. The
        task ends earlier only if the server breaks."""
        async with scraped(self._settings, lambda accept: exposition(self.backend, self.metrics, accept)):
            serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            try:
                yield serving
            finally:
                self._server.should_exit = True
                await serving
                if self.backend.traces is not None:
                    await asyncio.to_thread(self.backend.traces.close)

    def heed_signals(self) -> None:
        """All is loaded. From now on SIGTERM and SIGINT set `stopping`, and then `hurried`."""
        spare_the_collector()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, self._on_signal)
        if self.rules.keyring is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload, self.rules.keyring)

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
        served = self.backend.served
        route, body = "/generate", '{"prompt": "Once upon a time", "stream": true}'
        if served is not None and "generate" not in served.tasks:
            route = "/classify" if served.labels else "/v1/embeddings"
            body = '{"input": "Once upon a time"}'
        key = " -H 'authorization: Bearer '$KEY" if self.rules.keyring is not None else ""
        return f"url     {url}   try: curl -N {url}{route}{key} -H 'content-type: application/json' -d '{body}'"

    @staticmethod
    def _reload(keyring: Keyring) -> None:
        try:
            logger.info("the keys of %d tenants are read", keyring.reload())
        except StartupError as error:
            logger.error("the keys are what they were: %s", error)

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            self.hurried.set()
        self.stopping.set()
