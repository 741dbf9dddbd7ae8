"""`millrace serve`: one process with everything in it, put together and taken apart in order.

A part of the composition root, like `cli.py`. Start: settings, port, HTTP half (503 while loading), engine, worker,
open. Stop, on SIGTERM or SIGINT: close the port, let what runs end within `drain_s`, end what is left with a terminal
event, let the last bytes out, exit 0.
"""

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import uvicorn
import uvloop

from model.cache.store import bytes_per_block
from model.engine.engine import Engine, EngineStats
from model.families.registry import read_config, read_generation_defaults
from model.nn.decoder import as_dtype, num_parameters
from model.request import Finish, FinishReason
from service.broker.memory import MemoryBroker
from service.errors import StartupError
from service.http.app import create_app
from service.http.intake import Served
from service.http.routes import Backend
from service.logs import configure
from service.metrics import Metrics
from service.settings import BUNDLED, Settings
from service.worker import EngineFailed, Report, Worker

STUCK_S = 30.0  # without a step while there is work: not ready any more
LAST_BYTES_S = 5  # for connections to take what was written to them
SHUTTING_DOWN = Finish(FinishReason.ERROR, error="the server is shutting down")
FAILED = Finish(FinishReason.ERROR, error="the engine has failed")

logger = logging.getLogger(__name__)


def serve(args: argparse.Namespace) -> None:
    """Serve until a signal comes. Raises what refuses a start; exits with 1 if the engine fails."""
    flags = {name: value for name, value in vars(args).items() if name != "run" and value is not None}
    settings = Settings.load(**flags)
    configure(settings.log_level, as_json=settings.log_json)
    listener = bind(settings.host, settings.port)
    # One core is left to HTTP: the threads of a product wait for each other, so one pushed off its core stops them all.
    torch.set_num_threads(settings.threads or spare_cores())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runner.run(House(settings, listener).live()):
            sys.exit(1)


def spare_cores() -> int:
    """How many cores may compute while one answers HTTP; at least one."""
    return max(1, (os.cpu_count() or 1) - 1)


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


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: it would cut streams and end by the signal instead of with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def close_port(self) -> None:
        """Take no new connections; those that are open go on."""
        for server in self.servers:
            server.close()


class House:
    """The parts of one process, and their order."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings, self.listener = settings, listener
        self.host, self.port = listener.getsockname()[:2]
        self.metrics = Metrics(version("millrace"))
        self.backend = Backend(self._why_not)
        self.broker = MemoryBroker(settings.max_waiting, settings.max_waiting_tokens, settings.keep_s)
        self.worker: Worker[EngineStats] | None = None
        self.stopping = asyncio.Event()
        app = create_app(self.backend, self.metrics, version("millrace"))
        self.server = Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",  # its comings and goings say nothing that our lines don't
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=LAST_BYTES_S,
            )
        )

    async def live(self) -> bool:
        """Start, serve, stop. False if the engine failed."""
        serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        try:
            engine = await asyncio.to_thread(self._load)
            self.worker = Worker(self.broker, engine, self._observe)
            working = asyncio.create_task(self.worker.run())
            loop = asyncio.get_running_loop()
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, self.stopping.set)
            self.backend.loaded(self._served(engine), self.broker)
            print(self._banner(engine), flush=True)
            signalled = asyncio.create_task(self.stopping.wait())
            await asyncio.wait({signalled, working, serving}, return_when=asyncio.FIRST_COMPLETED)
            return await self._stop(working)
        finally:
            self.server.should_exit = True
            await serving

    async def _stop(self, working: asyncio.Task[None]) -> bool:
        self.stopping.set()
        self.server.close_port()
        self.broker.stop_accepting("the server is shutting down")
        assert self.worker is not None
        if not working.done():
            logger.info("draining: running requests may end within %.0f s", self.settings.drain_s)
            await self.worker.drain(self.settings.drain_s)
        [failure] = await asyncio.gather(working, return_exceptions=True)
        if failure is not None and not isinstance(failure, EngineFailed):  # that one was logged where it happened
            logger.error("the worker failed", exc_info=failure)
        await self.broker.end_all(FAILED if failure else SHUTTING_DOWN)
        return failure is None

    def _load(self) -> Engine:
        settings = self.settings
        return Engine.load(
            settings.model or BUNDLED,
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            cache_gib=settings.cache_gib,
        )

    def _served(self, engine: Engine) -> Served:
        folder = Path(self.settings.model or BUNDLED)
        config = read_config(folder)
        return Served(
            name=self.settings.model_name or folder.resolve().name,
            tokenizer=engine.tokenizer,
            max_model_len=engine.config.max_model_len,
            vocab_size=config.vocab_size,
            eos_ids=config.eos_ids,
            defaults=read_generation_defaults(folder),
            created=int(time.time()),
        )

    def _why_not(self) -> str | None:
        if self.stopping.is_set():
            return "the server is shutting down"
        assert self.worker is not None
        age_s = self.worker.progress_age_s()
        if not self.worker.alive:
            return "the engine has failed"
        return f"the engine has made no progress for {age_s:.0f} s" if age_s > STUCK_S else None

    def _observe(self, report: Report[EngineStats]) -> None:
        self.metrics.on_step(report.stats, report.step_s)

    def _banner(self, engine: Engine) -> str:
        decoder, config = engine.runner.decoder, engine.config
        tokens = config.num_blocks * config.block_size
        size = config.num_blocks * bytes_per_block(decoder.config, config.block_size, as_dtype(config.dtype)) / 2**30
        cuda, threads = config.device == "cuda", torch.get_num_threads()
        where = torch.cuda.get_device_name() if cuda else f"cpu with {threads} thread{'s' if threads > 1 else ''}"
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        body = '{"prompt": "Once upon a time", "stream": true}'
        served = self.backend.served
        assert served is not None
        return (
            f"model   {served.name}: {decoder.config.family}, {num_parameters(decoder) / 1e6:.1f} M parameters\n"
            f"device  {where}, {config.dtype}\n"
            f"cache   {tokens:,} tokens, {size:.2f} GiB; a sequence may have {config.max_model_len:,}\n"
            f"url     {url}   try: curl -N {url}/generate -H 'content-type: application/json' -d '{body}'"
        )
