"""A worker process that fails on command: the product's own worker and broker around an engine that is real or a toy,
with one failpoint between them. Without a keeper, so what it held comes back when its lease has run out.

    python -m tests.faults.toy --redis-url URL --model DIR --engine toy --step-s 0.01 --fail kill:sent --at 20

A failpoint is `<what>:<where>`; it strikes once, at the `--at`-th time that the place is passed with something there.
what: `kill` (SIGKILL to itself), `stop` (SIGSTOP to itself).
where: `prefill` (computed a part of a prompt, nothing drawn yet), `compute` (computed, not handed over to be
committed), `commit` (about to be sent), `sent` (executed in Redis, not heard of), `final` (the same, with an end in
it), `claim` (claimed in Redis, not heard of), `poison` (about to compute a request whose prompt begins with `POISON`
and that has `--at` ids).
"""

import argparse
import asyncio
import os
import secrets
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from model.engine.engine import Engine, EngineStats
from model.families.registry import read_config
from model.fingerprint import fingerprint, queue_name
from model.request import Delta, Finish, FinishReason, Request
from service.broker.base import Job, Verdict, WorkerSide
from service.broker.redis import PROTOCOL, Link, WorkerInfo
from service.broker.redis_work import RedisWork
from service.worker import EngineSide, Worker

POISON = (7, 7, 7)
SEATS = 64


def toy_id(seed: int, index: int, vocab_size: int) -> int:
    """The toy's token `index` of a request."""
    return zlib.crc32(b"%d %d" % (seed, index)) % vocab_size


class ToyEngine:
    """Draws `toy_id`; a step takes `step_s` however many requests are in it."""

    def __init__(self, vocab_size: int, step_s: float, seats: int = SEATS) -> None:
        self._vocab_size, self._step_s, self._seats = vocab_size, step_s, seats
        self._rows: dict[str, tuple[Request, int]] = {}
        self._pause = threading.Event()

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None:
        self._rows[request.id] = (request, len(so_far))

    def cancel(self, id: str) -> None:
        self._rows.pop(id, None)

    def has_work(self) -> bool:
        return bool(self._rows)

    def room(self) -> int:
        return self._seats - len(self._rows)

    def stats(self) -> EngineStats:
        return EngineStats(0, len(self._rows), 0, 0, 0, 0, 0, 0, len(self._rows))

    def step(self) -> list[Delta]:
        if not self._rows:
            return []
        self._pause.wait(self._step_s)
        return [self._advance(id) for id in list(self._rows)]

    def _advance(self, id: str) -> Delta:
        request, index = self._rows[id]
        last = index + 1 >= request.sampling.max_tokens
        self._rows[id] = (request, index + 1)
        if last:
            del self._rows[id]
        token_id = toy_id(request.sampling.seed, index, self._vocab_size)
        return Delta(id, index, (token_id,), finish=Finish(FinishReason.LENGTH) if last else None)


class Failpoint:
    """`strike(where)` at every place; the `at`-th time at its own place it does what it is for."""

    def __init__(self, told: str, at: int) -> None:
        self.what, _, self.where = told.partition(":")
        self.at, self._left = at, at

    def strike(self, where: str) -> None:
        """Fail, if this is the place and the time."""
        if where != self.where:
            return
        self._left -= 1
        if self._left == 0 or where == "poison":
            self.fail()

    def fail(self) -> None:
        """Do it, now."""
        print(f"failpoint {self.what}:{self.where}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGSTOP)


class FailingEngine:
    """An engine with the places `prefill`, `compute` and `poison`; `throttle_s` is added to each step."""

    def __init__(self, engine: EngineSide[EngineStats], failpoint: Failpoint, throttle_s: float = 0.0) -> None:
        self._engine, self._failpoint, self._throttle_s = engine, failpoint, throttle_s
        self._lengths: dict[str, int] = {}  # output ids of what is in the engine
        self._poisoned: set[str] = set()
        self._fresh: set[str] = set()  # in the engine without having drawn
        self._pause = threading.Event()

    def add(self, request: Request, so_far: Sequence[int] = ()) -> None:
        self._lengths[request.id] = len(so_far)
        self._fresh.add(request.id)
        if request.prompt_ids[: len(POISON)] == POISON:
            self._poisoned.add(request.id)
        self._engine.add(request, so_far)

    def cancel(self, id: str) -> None:
        self._lengths.pop(id, None)
        self._fresh.discard(id)
        self._engine.cancel(id)

    def has_work(self) -> bool:
        return self._engine.has_work()

    def room(self) -> int:
        return self._engine.room()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def step(self) -> list[Delta]:
        if any(self._lengths.get(id) == self._failpoint.at for id in self._poisoned):
            self._failpoint.strike("poison")
        deltas = self._engine.step()
        self._pause.wait(self._throttle_s)
        deltas_with_ids = [delta for delta in deltas if delta.token_ids or delta.finish]
        if self._fresh - {delta.id for delta in deltas_with_ids}:
            self._failpoint.strike("prefill")
        for delta in deltas_with_ids:
            self._fresh.discard(delta.id)
            self._lengths[delta.id] = delta.start + len(delta.token_ids)
            if delta.finish:
                del self._lengths[delta.id]
        if any(delta.token_ids for delta in deltas):
            self._failpoint.strike("compute")
        return deltas


class FailingBroker:
    """A worker's side of a broker with the places `claim`, `commit`, `sent` and `final`."""

    def __init__(self, broker: WorkerSide, failpoint: Failpoint) -> None:
        self._broker, self._failpoint = broker, failpoint

    async def claim(self, room: int) -> list[Job]:
        jobs = await self._broker.claim(room)
        self._failpoint.strike("claim")
        return jobs

    async def commit(self, step: Sequence[Delta]) -> Mapping[str, Verdict]:
        if any(delta.token_ids for delta in step):
            self._failpoint.strike("commit")
        verdicts = await self._broker.commit(step)
        if any(delta.token_ids for delta in step):
            self._failpoint.strike("sent")
        if any(delta.finish for delta in step):
            self._failpoint.strike("final")
        refused = [id for id, verdict in verdicts.items() if verdict is Verdict.FENCED]
        if refused:
            print(f"refused {len(refused)}", flush=True)
        return verdicts

    async def release(self, ids: Iterable[str]) -> None:
        await self._broker.release(ids)

    async def abandon(self, ids: Iterable[str]) -> None:
        await self._broker.abandon(ids)


def info_of(folder: Path, length: int) -> WorkerInfo:
    """What `millrace worker --dtype float32` announces for this folder and context length."""
    found = fingerprint(folder)
    assert found.weights is not None
    queue = queue_name(found.door, found.weights, "float32", length, PROTOCOL)
    return WorkerInfo(queue, found.door, found.weights, "float32", length)


async def work(args: argparse.Namespace) -> None:
    """Until SIGTERM; then hand over what does not end within the drain."""
    failpoint = Failpoint(args.fail, args.at)
    if args.engine == "real":
        real = Engine.load(args.model, device="cpu", dtype="float32")
        engine, length = FailingEngine(real, failpoint, args.step_s), real.config.max_model_len
    else:
        config = read_config(args.model)
        toy = ToyEngine(config.vocab_size, args.step_s)
        engine, length = FailingEngine(toy, failpoint), config.max_position
    link = Link(args.redis_url, may_load=True)
    await link.open()
    name = f"toy-{os.getpid()}-{secrets.token_hex(4)}"
    broker = RedisWork(link, name, info_of(args.model, length), args.lease_s)
    await broker.open()
    worker = Worker(FailingBroker(broker, failpoint), engine)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    working = asyncio.create_task(worker.run())
    print(f"working as {name}", flush=True)
    await stop.wait()
    await worker.drain(args.drain_s)
    await working
    await broker.close()
    await link.close()


def main(argv: Sequence[str]) -> None:
    """Run one worker until it ends or is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lease-s", type=float, default=3.0)
    parser.add_argument("--drain-s", type=float, default=5.0)
    parser.add_argument("--engine", choices=["toy", "real"], default="toy")
    parser.add_argument("--step-s", type=float, default=0.0, help="length of a toy's step; added to a real engine's")
    parser.add_argument("--fail", default=":")
    parser.add_argument("--at", type=int, default=1)
    torch.set_num_threads(1)
    asyncio.run(work(parser.parse_args(argv)))


def forked(argv: Sequence[str], log: str) -> None:
    """The same in a process that was forked from one which has imported all this: it says everything to `log`."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
