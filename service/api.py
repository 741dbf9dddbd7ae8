"""`millrace api`: the HTTP half alone, before a queue in Redis; and `serve --redis-url`, which starts a worker as well.

A part of the composition root, without torch. Start: settings, port, Redis, tokenizer, queue. Stop, on SIGTERM or
SIGINT: close the port, let open streams go on for `drain_s`, hand the rest over (their clients go on reading elsewhere,
nothing is cancelled), let the last bytes out, exit 0. A second signal skips the waiting.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from dataclasses import replace

import uvloop

from model.families.registry import read_config
from model.fingerprint import Fingerprint, fingerprint
from model.tokenizer import Tokenizer
from service.broker.redis import Link
from service.broker.redis_requests import RedisRequests
from service.child import command
from service.door import Door, served
from service.errors import Unavailable
from service.keeper import REFUSED
from service.listen import bind
from service.logs import configure
from service.lookout import NO_WORKER, Lookout
from service.settings import BUNDLED, Settings, shown_url

LOOK_S = 1.0  # between two looks at who works
SILENT_S = 3.0  # without an answer to a look: Redis is away
HICCUP_S = 0.5  # a connection lost for less refuses nobody: the call is sent again on the next
LAST_WORDS_S = 2.0  # for what the worker wrote last to be read, once it has ended
OPEN_S = 0.05  # between two looks at what is still open, in a drain

logger = logging.getLogger(__name__)
Child = asyncio.subprocess.Process


def api(settings: Settings) -> None:
    """Serve until a signal comes. Raises what refuses a start."""
    _run(settings, with_worker=False)


def serve(settings: Settings) -> None:
    """The same, with a worker as a child. Exits with 1 if that ends by itself, with 3 if it refuses to start."""
    _run(settings, with_worker=True)


def _run(settings: Settings, with_worker: bool) -> None:
    configure(settings.log_level, as_json=settings.log_json)
    listener = bind(settings.host, settings.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(Api(settings, listener).live(with_worker)))


class Api:
    """The parts of one process, and their order."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        url = settings.queue_url
        assert url is not None
        self._settings, self._url = settings, url
        self._door = Door(settings, listener, self._why_not, self._why_refuse, self._facts)
        self._link = Link(self._url)
        keyring = self._door.rules.keyring
        weights = None if keyring is None else keyring.weights
        self._requests = RedisRequests(
            self._link, self._queue, settings.max_waiting, settings.max_waiting_tokens, settings.keep_s, weights
        )
        self._lookout = Lookout(Fingerprint("", None), settings.dtype, settings.quantize)
        metrics = self._door.metrics
        metrics.registry.register(self._link.metrics)
        metrics.gauge("workers", "Workers of this model that are alive.", lambda: self._lookout.num_fitting)
        self._answered_s: float | None = None  # when a look was answered, for the last time
        self._fits = asyncio.Event()  # some worker, for the first time

    async def live(self, with_worker: bool) -> int:
        """Start, serve, stop. The exit code."""
        try:
            async with self._door.open() as serving:
                await self._link.open()
                await asyncio.to_thread(self._load)
                await self._requests.open()
                worker = await self._start_worker() if with_worker else None
                tasks = [asyncio.create_task(self._look_for_ever()), asyncio.create_task(self._invite(worker))]
                ending = [tasks[0], *([asyncio.create_task(worker.wait())] if worker else [])]
                self._door.heed_signals()
                await self._door.until_told(serving, *ending)
                try:
                    return await self._stop(worker, tasks[0])
                finally:
                    for task in tasks:
                        task.cancel()
        finally:
            await self._link.close()  # after the last stream, which may have something to cancel

    async def _stop(self, worker: Child | None, looking: "asyncio.Task[None]") -> int:
        code = 0
        if looking.done():
            logger.error("the search for workers failed", exc_info=looking.exception())
            code = 1
        if worker is not None and worker.returncode is not None:
            code = REFUSED if worker.returncode == REFUSED else 1  # a refusal has told its reason
            if code != REFUSED:
                logger.error("the worker ended by itself, with %d", worker.returncode)
        elif worker is not None:
            worker.terminate()
        await self._drain(worker)
        await self._requests.close()
        if worker is not None and worker.returncode is None:
            code = await self._outlive(worker) or code
        return code

    async def _drain(self, worker: Child | None) -> None:
        """Let open streams go on while there is time, and somebody to compute them."""
        if self._door.num_open:
            logger.info("draining: open streams may go on for %.0f s", self._settings.drain_s)
        now = time.monotonic()
        until_s, alone_until_s = now + self._settings.drain_s, math.inf
        while self._door.num_open and now < until_s and not self._door.hurried.is_set():
            if worker is not None and worker.returncode is not None:
                await self._look()
                alone_until_s = min(alone_until_s, now + LAST_WORDS_S)
                if now > alone_until_s and self._lookout.complaint is not None:
                    return
            await asyncio.sleep(OPEN_S)
            now = time.monotonic()

    async def _outlive(self, worker: Child) -> int:
        """Wait for the worker's own drain; 0 if it went well."""
        ended, hurried = asyncio.create_task(worker.wait()), asyncio.create_task(self._door.hurried.wait())
        await asyncio.wait({ended, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            worker.send_signal(signal.SIGINT)
        return 0 if await ended == 0 else 1

    # --- the start ---------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        folder = self._settings.model or BUNDLED
        longest = read_config(folder).max_position  # until a worker says how much it takes
        model = served(self._settings, Tokenizer.load(folder), longest)
        self._lookout = Lookout(fingerprint(folder), self._settings.dtype, self._settings.quantize)
        self._door.backend.loaded(model, self._requests)

    async def _start_worker(self) -> Child:
        """With our settings, but for the port of its metrics, which is the one after ours. Of its own session: Ctrl-C
        at a terminal is for us, and we tell it."""
        port = self._settings.metrics_port
        own = self._settings if not port else self._settings.model_copy(update={"metrics_port": port + 1})
        return await asyncio.create_subprocess_exec(
            *command("worker", "--parent", str(os.getpid())), env=own.environment(), start_new_session=True
        )

    async def _invite(self, worker: Child | None) -> None:
        """Tell where it listens; with a worker of our own, once that can answer."""
        if worker is not None:
            await self._fits.wait()
        name, where = self._settings.served_name, shown_url(self._url)
        sys.stdout.write(f"api     {name}   queue: {where}\n{self._door.invitation()}\n")
        sys.stdout.flush()

    # --- the workers -------------------------------------------------------------------------------------------------

    async def _look_for_ever(self) -> None:
        while True:
            await self._look()
            await self._link.look(LOOK_S)
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        """See who works, and go by what they take."""
        try:
            workers = await self._requests.workers()
        except Unavailable:
            return
        before, self._answered_s = self._lookout.complaint, time.monotonic()
        self._lookout.see(workers)
        complaint, chosen = self._lookout.complaint, self._lookout.chosen
        if complaint != before:
            logger.info(complaint or "a worker of this model is alive")
        if complaint is None:
            self._fits.set()
        model = self._door.backend.served
        assert model is not None
        if chosen is not None and chosen.max_model_len != model.max_model_len:
            self._door.backend.loaded(replace(model, max_model_len=chosen.max_model_len), self._requests)

    def _queue(self) -> str:
        if self._lookout.chosen is None:
            raise Unavailable(self._why_refuse() or NO_WORKER)
        return self._lookout.chosen.queue

    def _why_refuse(self) -> str | None:
        """A new request is taken once there was a worker, for the queue outlives workers."""
        if self._answered_s is None:
            return NO_WORKER  # workers bring the functions of the queue, so it may have none yet
        silent_s, away_s = time.monotonic() - self._answered_s, self._link.away_s()
        if away_s > HICCUP_S or silent_s > SILENT_S:
            return f"the queue can't be reached: Redis has not answered for {max(silent_s, away_s):.1f} s"
        return self._lookout.complaint if self._lookout.chosen is None else None

    def _why_not(self) -> str | None:
        return self._why_refuse() or self._lookout.complaint

    def _facts(self) -> dict[str, object]:
        return {"workers": self._lookout.num_fitting}
