"""`millrace serve`: one process with everything in it, put together and taken apart in order.

A part of the composition root, like `cli.py`. Start: settings, port, HTTP half (503 while loading), engine, worker,
open. Stop, on SIGTERM or SIGINT: close the port, let what runs end within `drain_s`, end what is left with a terminal
event, let the last bytes out, exit 0. With `--redis-url` the two halves are two processes: see `api.py`.
"""

import asyncio
import socket
import sys

import uvloop

from model.engine.engine import EngineStats
from model.request import Finish, FinishReason
from service.attention import looker
from service.broker.memory import MemoryBroker
from service.door import STOPPING, Door, served
from service.listen import bind
from service.logs import configure
from service.metrics_work import WorkMetrics
from service.pulse import Pulse
from service.settings import BUNDLED, Settings
from service.work import described, load_engine, use_cores, wound_up
from service.worker import Worker

SHUT_DOWN = Finish(FinishReason.ERROR, error=STOPPING)
FAILED = Finish(FinishReason.ERROR, error="the engine has failed")


def serve(settings: Settings) -> None:
    """Serve until a signal comes. Raises what refuses a start; exits with 1 if the engine fails."""
    configure(settings.log_level, as_json=settings.log_json)
    listener = bind(settings.host, settings.port)
    use_cores(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runner.run(House(settings, listener).live()):
            sys.exit(1)


class House:
    """The parts of one process, and their order."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings = settings
        self.door = Door(settings, listener, self._why_not, facts=self._facts)
        keyring = self.door.rules.keyring
        weights = None if keyring is None else keyring.weights
        self.broker = MemoryBroker(settings.max_waiting, settings.max_waiting_tokens, settings.keep_s, weights)
        self.worker: Worker[EngineStats] | None = None
        metrics = self.door.metrics
        self.work: WorkMetrics[EngineStats] = WorkMetrics(metrics.registry, traces=self.door.backend.traces)
        metrics.gauge("workers", "Engines that are alive.", lambda: self.worker is not None and self.worker.alive)

    async def live(self) -> bool:
        """Start, serve, stop. False if the engine failed."""
        async with self.door.open() as serving:
            engine = await asyncio.to_thread(load_engine, self.settings)
            if self.settings.attention_view:
                self.door.backend.look = await asyncio.to_thread(looker, self.settings.model or BUNDLED)
            self.worker = Worker(self.broker, engine, self.work.on_step, left=self.work.on_leave)
            self.work.progress_age_s = self.worker.progress_age_s
            working = asyncio.create_task(self.worker.run())
            beating = asyncio.create_task(Pulse(lambda: self.work.stats).beat_for_ever())
            self.door.heed_signals()
            self.door.backend.loaded(served(self.settings, engine.tokenizer, engine.config.max_model_len), self.broker)
            print(f"{described(engine, self.settings)}\n{self.door.invitation()}", flush=True)
            await self.door.until_told(working, serving)
            self.broker.stop_accepting(STOPPING)
            ended_well = await wound_up(self.worker, working, self.settings.drain_s)
            beating.cancel()
            await self.broker.end_all(SHUT_DOWN if ended_well else FAILED)
            return ended_well

    def _facts(self) -> dict[str, object]:
        return {"attention_view": True} if self.settings.attention_view else {}

    def _why_not(self) -> str | None:
        assert self.worker is not None
        age_s = self.worker.progress_age_s()
        if not self.worker.alive:
            return "the engine has failed"
        return f"the engine has made no progress for {age_s:.0f} s" if age_s > self.settings.stuck_s else None
