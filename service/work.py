"""The engine process of a worker: an engine, and its link to the queue. Its parent is `keeper.py`.

A part of the composition root. Start: link, engine, announcement. Stop, on SIGTERM: claim nothing, let what runs end
within `drain_s`, give the rest back, take the announcement back, exit 0. It exits with 1 if its engine fails or hangs;
a thread that hangs can't be stopped, so then it ends where it is, and its parent sees to its requests. When its parent
is gone it gives everything back at once and ends.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import uvloop

from model.cache.states import bytes_per_slot
from model.cache.store import bytes_per_block
from model.engine.engine import Engine, EngineStats
from model.fingerprint import fingerprint, queue_name
from model.nn.decoder import as_dtype, num_bytes, num_parameters
from service.broker.redis import PROTOCOL, Link, WorkerInfo
from service.broker.redis_work import RedisWork
from service.child import KEEPER_GONE
from service.logs import configure, fields
from service.metrics import Base
from service.metrics_work import WorkMetrics
from service.pulse import Pulse
from service.scrape import scraped
from service.settings import BUNDLED, Settings, shown_url
from service.traces import Traces
from service.worker import EngineFailed, Worker

ALONE_S = 2.0  # after its keeper's death: to hand its requests back, and then it ends, whatever hangs
LOOK_S = 1.0  # between two looks at the engine's progress

logger = logging.getLogger(__name__)


def work(settings: Settings, name: str, up: int) -> None:
    """Compute until SIGTERM, under a name that is used once; a byte is written to the file descriptor `up` when it has
    begun. Raises what refuses a start."""
    configure(settings.log_level, as_json=settings.log_json)
    use_cores(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(_live(settings, name, up)))


def use_cores(settings: Settings) -> None:
    """Set the number of threads that compute. One core is left to everything else: the threads of a product wait for
    each other, so one pushed off its core stops them all."""
    torch.set_num_threads(settings.threads or spare_cores())


def spare_cores() -> int:
    """How many cores may compute while one answers; at least one."""
    return max(1, (os.cpu_count() or 1) - 1)


def load_engine(settings: Settings) -> Engine:
    """Raises `CheckpointError` and `EngineConfigError`."""
    return Engine.load(
        settings.model or BUNDLED,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize or "none",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        cache_gib=settings.cache_gib,
        prefix_cache=settings.prefix_cache,
        native=settings.native,
        deterministic=settings.deterministic,
    )


def described(engine: Engine, settings: Settings) -> str:
    """Three lines for the start: model, device, cache."""
    decoder, config = engine.runner.decoder, engine.config
    tokens = config.num_blocks * config.block_size
    in_blocks = config.num_blocks * bytes_per_block(decoder.config, config.block_size, as_dtype(config.dtype))
    size = (in_blocks + config.max_num_seqs * bytes_per_slot(decoder.config)) / 2**30
    cuda, threads = config.device == "cuda", torch.get_num_threads()
    where = torch.cuda.get_device_name() if cuda else f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    return (
        f"model   {settings.served_name}: {decoder.config.family}, {num_parameters(decoder) / 1e6:.1f} M parameters, "
        f"{num_bytes(decoder) / 2**20:.1f} MiB\n"
        f"device  {where}, {config.number_format}\n"
        f"cache   {tokens:,} tokens, {size:.2f} GiB; a sequence may have {config.max_model_len:,}"
    )


async def _live(settings: Settings, name: str, up: int) -> int:
    """The exit code. What is raised here is a refusal: nothing has been claimed."""
    url = settings.queue_url
    assert url is not None
    link = Link(url, may_load=True)
    await link.open()
    try:
        engine = await asyncio.to_thread(load_engine, settings)
        info = await asyncio.to_thread(_announcement, settings.model or BUNDLED, engine)
        queue = RedisWork(link, name, info, settings.lease_s)
        stopping, alone = asyncio.Event(), asyncio.Event()
        metrics = Base(version("millrace"))
        metrics.registry.register(link.metrics)
        metrics.draining.set_function(stopping.is_set)
        endpoint = settings.otlp_endpoint
        traces = None if endpoint is None else Traces(endpoint, "millrace-worker", version("millrace"))
        work: WorkMetrics[EngineStats] = WorkMetrics(
            metrics.registry, lambda: (queue.num_redelivered, queue.num_taken_over), traces
        )
        worker = Worker(queue, engine, work.on_step, left=work.on_leave)
        work.progress_age_s = worker.progress_age_s

        async def exposition(accept: str) -> tuple[bytes, str]:
            return metrics.exposition(accept)

        def orphaned() -> None:
            alone.set()
            stopping.set()
            end = threading.Timer(ALONE_S, os._exit, (1,))
            end.daemon = True
            end.start()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        asyncio.get_running_loop().add_signal_handler(KEEPER_GONE, orphaned)
        await queue.open()
        beating = asyncio.create_task(Pulse(lambda: work.stats).beat_for_ever())
        try:
            async with scraped(settings, exposition):
                sys.stdout.write(f"{described(engine, settings)}\nworker  {name}   queue: {shown_url(url)}\n")
                sys.stdout.flush()
                os.write(up, b"1")
                return await _compute(worker, link, settings, stopping, alone)
        finally:
            beating.cancel()
            if traces is not None:
                await asyncio.to_thread(traces.close)
            await queue.close()
            logger.info("worker %s ended", name, extra=_account(engine.stats(), queue))
    finally:
        await link.close()


def _announcement(folder: Path, engine: Engine) -> WorkerInfo:
    own, config = fingerprint(folder), engine.config
    assert own.weights is not None, "what was loaded just now is there"
    name = queue_name(own.door, own.weights, config.number_format, config.max_model_len, PROTOCOL)
    return WorkerInfo(name, own.door, own.weights, config.number_format, config.max_model_len, PROTOCOL)


async def _compute(
    worker: Worker[EngineStats], link: Link, settings: Settings, stopping: asyncio.Event, alone: asyncio.Event
) -> int:
    working = asyncio.create_task(worker.run())
    watchdog = Watchdog(worker.progress_age_s, link.away_s, settings.stuck_s)
    threading.Thread(target=watchdog.run, name="watchdog", daemon=True).start()
    told = asyncio.create_task(stopping.wait())
    await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    return 0 if await wound_up(worker, working, 0.0 if alone.is_set() else settings.drain_s) else 1


async def wound_up(worker: Worker[EngineStats], working: "asyncio.Task[None]", drain_s: float) -> bool:
    """Drain a worker whose `run` is `working`, unless it has ended by itself. False if it failed; why is logged."""
    if not working.done():
        logger.info("draining: running requests may end within %.0f s", drain_s)
        await worker.drain(drain_s)
    [failure] = await asyncio.gather(working, return_exceptions=True)
    if failure is not None and not isinstance(failure, EngineFailed):  # that one was logged where it happened
        logger.error("the worker failed", exc_info=failure)
    return failure is None


def _account(stats: EngineStats, queue: RedisWork) -> dict[str, object]:
    return fields(
        steps=stats.steps_total,
        prompt_tokens=stats.prompt_tokens_total,
        output_tokens=stats.output_tokens_total,
        preemptions=stats.preemptions_total,
        prefix_found_tokens=stats.prefix_found_total,
        taken_over=queue.num_taken_over,
    )


class Watchdog:
    """Ends the process when its engine makes no progress although it has work and Redis takes its results. A thread of
    its own looks, so that it also sees an event loop that hangs."""

    def __init__(
        self,
        progress_age_s: Callable[[], float],
        away_s: Callable[[], float],
        stuck_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress_age_s, self._away_s, self._stuck_s, self._clock = progress_age_s, away_s, stuck_s, clock
        self._back_s = clock()  # since then Redis answers

    def run(self) -> None:
        """Look for ever."""
        while not self.hangs():
            time.sleep(LOOK_S)
        logger.error("the engine has made no progress for %.0f s; ending this process", self._progress_age_s())
        os._exit(1)

    def hangs(self) -> bool:
        """Whether it is time to end it."""
        now = self._clock()
        if self._away_s() > 0:
            self._back_s = now
        return min(self._progress_age_s(), now - self._back_s) > self._stuck_s
