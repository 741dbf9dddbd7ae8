"""`make chaos`: random faults against real processes under load, every stream compared with an unbroken run.

Two apis, some workers with the real engine in float32, one Redis with its log on disk, and clients that never stop
asking and come back wherever their streams break. Every `--every-s` seconds something is done to one of the processes.
A stream is exact if its ids, text and usage are those of one engine that nobody disturbed, with one terminal event.
`--only kills` is kill -9 of engine, keeper and both in turn; otherwise every fault has its chance. Prints figures and
exits with 1 if a stream was not exact, an answer was neither 200 nor 503, or something is left over.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.faults.client import Reading, resilient
from tests.faults.history import Unfailed, complaints
from tests.faults.leaks import assert_clean
from tests.faults.load import PROMPTS
from tests.faults.procs import Cluster, Worker
from tests.faults.redis_server import RedisServer

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
HELD = "millrace:{0}:held:"
LONGEST = 200  # tokens of a stream
SEEDS = 8
PATIENCE_S = 10.0  # for some worker to decode


@dataclass
class Hit:
    """A kill of a worker: when, how, and what it was computing, by id and number of tokens so far."""

    at_s: float
    how: str
    requests: dict[str, int]


@dataclass
class Tally:
    """What has happened."""

    faults: Counter[str] = field(default_factory=Counter)
    hits: list[Hit] = field(default_factory=list)
    num_streams: int = 0
    num_tokens: int = 0
    num_claims: int = 0  # beyond the first of each request
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    stalls_s: list[float] = field(default_factory=list)  # of streams that a kill hit in the middle of decoding


class Chaos:
    """The cluster, its load, and what is done to it."""

    def __init__(self, cluster: Cluster, oracle: Unfailed, args: argparse.Namespace) -> None:
        self.cluster, self.oracle, self.args = cluster, oracle, args
        self.tally, self.rng = Tally(), random.Random(args.seed)
        self.turn = 0
        others: dict[str, tuple[int, Callable[[], Any]]] = {
            "worker frozen past its lease": (2, self.freeze_worker),
            "worker drained": (2, self.drain_worker),
            "api killed": (2, self.kill_api),
            "api stopped": (2, self.stop_api),
            "Redis killed, its log kept": (2, self.kill_redis),
            "Redis frozen": (1, self.freeze_redis),
            "Redis's clock stepped": (1, self.step_clock),
        }
        self.faults = {"worker killed": (6, self.kill_worker)} | ({} if args.only == "kills" else others)

    # --- what is done ------------------------------------------------------------------------------------------------

    async def kill_worker(self) -> None:
        """kill -9 of an engine, a keeper, or both, in turn: three times of four of a worker that is decoding, once one
        is, else of any that there is."""
        if not (up := await self._to_kill(patient=self.turn % 4 != 0)):
            return
        held = self._held()
        worker, how = self.rng.choice(up), ("engine", "keeper", "both")[self.turn % 3]
        self.turn += 1
        hit = Hit(time.monotonic(), how, self._requests(worker, held))
        if how == "engine":
            worker.kill_engine()
        elif how == "keeper":
            worker.kill9()
        else:
            worker.kill_both()
        self.tally.hits.append(hit)
        self.tally.faults[f"worker killed: {how}"] += 1
        if how != "engine":
            self.cluster.workers.remove(worker)
            self.cluster.worker()

    async def _to_kill(self, patient: bool) -> list[Worker]:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            up = [worker for worker in self.cluster.workers if worker.alive() and worker.children()]
            held = self._held()
            decoding = [worker for worker in up if any(self._requests(worker, held).values())]
            if decoding or not patient or time.monotonic() > until_s:
                return (decoding if patient else []) or up
            await asyncio.sleep(0.02)

    async def freeze_worker(self) -> None:
        """A zombie: it wakes when others have taken over, and its writes must be refused."""
        worker = self.rng.choice(self.cluster.workers)
        worker.freeze()
        await asyncio.sleep(2 * self.cluster.lease_s)
        worker.thaw()

    async def drain_worker(self) -> None:
        worker = self.rng.choice(self.cluster.workers)
        worker.term()
        self.cluster.workers.remove(worker)
        self.cluster.worker("--drain-s", "1")
        code = await asyncio.to_thread(worker.exit_code)
        if code != 0:
            self.tally.wrong.append(f"{worker.name} drained with {code}")

    async def kill_api(self) -> None:
        api = self.rng.choice(self.cluster.apis)
        api.kill9()
        self.cluster.apis.remove(api)
        self.cluster.api("--drain-s", "1")

    async def stop_api(self) -> None:
        api = self.rng.choice(self.cluster.apis)
        api.term()
        self.cluster.apis.remove(api)
        self.cluster.api("--drain-s", "1")
        code = await asyncio.to_thread(api.exit_code)
        if code != 0:
            self.tally.wrong.append(f"{api.name} stopped with {code}")

    async def kill_redis(self) -> None:
        self.cluster.redis.kill9()
        await asyncio.sleep(self.rng.uniform(0.1, 2.0))
        await asyncio.to_thread(self.cluster.redis.start)

    async def freeze_redis(self) -> None:
        self.cluster.redis.stop()
        await asyncio.sleep(self.rng.uniform(0.5, 4.0))
        self.cluster.redis.cont()

    async def step_clock(self) -> None:
        """As if Redis's wall clock had been put an hour on or back since the last call."""
        hour_ms = 3_600_000 * self.rng.choice((-1, 1))
        self.cluster.redis.cli().hincrby("millrace:{0}:clock", "wall", hour_ms)

    def _held(self) -> dict[str, set[str]]:
        """What each worker has claimed, by its name."""
        cli = self.cluster.redis.cli()
        found: dict[Any, Any] = {key: cli.smembers(key) for key in cli.scan_iter(HELD + "*")}
        return {key.decode().removeprefix(HELD): {id.decode() for id in ids} for key, ids in found.items()}

    def _requests(self, worker: Worker, held: dict[str, set[str]]) -> dict[str, int]:
        """What a worker computes, with the number of tokens so far. The keeper's process id is in the engine's name."""
        cli = self.cluster.redis.cli()
        ids = [id for name, ids in held.items() if f"-{worker.pid}-" in name for id in ids]
        return {id: int(cli.hget("millrace:{0}:r:" + id, "n") or 0) for id in ids}

    # --- the load ----------------------------------------------------------------------------------------------------

    async def client(self, stop: asyncio.Event) -> None:
        """One stream after the other."""
        while not stop.is_set():
            body = self.oracle_body(self.rng.randint(LONGEST // 2, LONGEST))
            key = f"{self.rng.getrandbits(128):032x}"
            self.note(await resilient(partial(self.ports, self.rng.random()), body, key=key, give_up_s=120.0))

    def ports(self, first: float) -> list[int]:
        """Of the apis that run, beginning at a place of the client's own."""
        ports = self.cluster.ports()
        at = int(first * len(ports))
        return ports[at:] + ports[:at]

    def oracle_body(self, max_tokens: int) -> dict[str, Any]:
        from_few = {"prompt": self.rng.choice(PROMPTS), "seed": self.rng.randrange(SEEDS), "max_tokens": max_tokens}
        return from_few | SAMPLING

    def note(self, reading: Reading) -> None:
        """Compare a stream that has ended, and see how long the kills held it up."""
        tally = self.tally
        tally.num_streams += 1
        tally.num_tokens += reading.num_tokens
        tally.statuses.update(reading.statuses)
        if told := complaints(reading, self.oracle):
            tally.wrong.append(f"{reading.id}: {told}")
            print(f"WRONG {tally.wrong[-1]}", flush=True)
        with suppress(redis.RedisError):  # it may be away just now: then this one is not counted
            claims = self.cluster.redis.cli().hget("millrace:{0}:r:" + reading.id, "at")
            tally.num_claims += max(0, int(claims or 0) - 1)
        times = [event.at_s for event in reading.events]
        for hit in tally.hits:
            if hit.requests.get(reading.id, 0) > 0:
                after = next((at_s for at_s in times if at_s > hit.at_s), None)
                before = max((at_s for at_s in times if at_s <= hit.at_s), default=None)
                if after is not None and before is not None:
                    tally.stalls_s.append(after - before)

    # --- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the time is over or there were enough kills, and every stream has ended."""
        stop = asyncio.Event()
        clients = [asyncio.create_task(self.client(stop)) for _ in range(self.args.streams)]
        until_s, told_s = time.monotonic() + self.args.minutes * 60, time.monotonic()
        names, weights = zip(*((name, weight) for name, (weight, _) in self.faults.items()), strict=True)
        while time.monotonic() < until_s and len(self.tally.hits) < (self.args.kills or 10**9):
            await asyncio.sleep(self.args.every_s * self.rng.uniform(0.5, 1.5))
            [name] = self.rng.choices(names, weights)
            await self.faults[name][1]()
            if name != "worker killed":
                self.tally.faults[name] += 1
            if time.monotonic() > told_s + 30:
                told_s = time.monotonic()
                self.report(brief=True)
        stop.set()
        await asyncio.gather(*clients)

    def report(self, brief: bool = False) -> None:
        """The figures so far."""
        tally = self.tally
        middle = sum(any(hit.requests.values()) for hit in tally.hits)
        exact = tally.num_streams - len(tally.wrong)
        print(
            f"{len(tally.hits)} kills, {middle} in the middle of decoding; {tally.num_streams} streams of "
            f"{tally.num_tokens} tokens, {exact} exact; {tally.num_claims} take-overs; "
            f"statuses {dict(tally.statuses)}",
            flush=True,
        )
        if brief:
            return
        print(f"faults: {dict(tally.faults)}")
        if tally.stalls_s:
            stalls = sorted(tally.stalls_s)
            p99 = stalls[min(len(stalls) - 1, int(0.99 * len(stalls)))]
            print(
                f"stall of {len(stalls)} streams hit while decoding: p50 {statistics.median(stalls):.2f} s, "
                f"p99 {p99:.2f} s, max {stalls[-1]:.2f} s (lease {self.cluster.lease_s:g} s)"
            )


SAMPLING = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, help="stop after so many kills of workers")
    parser.add_argument("--only", choices=["kills", "all"], default="all")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--every-s", type=float, default=2.0)
    parser.add_argument("--lease-s", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        oracle = Unfailed(args.model, LONGEST)
        server = stack.enter_context(RedisServer(folder / "redis", appendonly=True))
        cluster = stack.enter_context(Cluster(server, args.model, folder, lease_s=args.lease_s))
        chaos = Chaos(cluster, oracle, args)
        bodies = [{"prompt": p, "seed": s, "max_tokens": LONGEST, **SAMPLING} for p in PROMPTS for s in range(SEEDS)]
        oracle.prepare(bodies)
        for _ in range(2):
            cluster.api("--drain-s", "1")
        for _ in range(args.workers):
            cluster.worker()
        cluster.until_ready()
        began_s = time.monotonic()
        asyncio.run(chaos.run())
        print(f"{time.monotonic() - began_s:.0f} s")
        chaos.report()
        cpu = {process.name: f"{process.cpu_s():.0f} s" for process in (*cluster.apis, *cluster.workers)}
        print(f"processor time of what runs now: {cpu}")
        assert_clean(cluster)
    if chaos.tally.wrong or set(chaos.tally.statuses) - {200, 503}:
        sys.exit(1)


if __name__ == "__main__":
    main()
