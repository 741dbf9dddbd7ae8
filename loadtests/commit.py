"""`make bench-commit`: how long the commit of a step takes, and an admission, over a real Redis on loopback.

The worker's side alone, so without the engine; readers are attached, and what is published to them is taken off Redis
by a process of its own. Times are those that the worker waits.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

from model.request import Delta, Request
from service.broker.redis import PREFIX, Link, WorkerInfo
from service.broker.redis_requests import RedisRequests
from service.broker.redis_work import RedisWork
from tests.faults.redis_server import RedisServer

INFO = WorkerInfo("queue", "door", "weights", "float32", 4096)


def listen(url: str) -> None:
    """Take the mail and drop it."""
    with redis.Redis.from_url(url, protocol=2) as client, client.pubsub() as mail:
        mail.subscribe(PREFIX + "mail:api")
        for _ in mail.listen():
            pass


async def measure(url: str, num_requests: int, num_steps: int) -> None:
    """Print medians and 99th percentiles, milliseconds."""
    link = Link(url, may_load=True)
    await link.open()
    work = RedisWork(link, "worker", INFO)
    await work.open()
    door = RedisRequests(link, lambda: "queue", 10 * num_requests, 10**9)
    times: dict[str, list[float]] = {"submit": [], "commit": []}
    ids = [f"gen-{i:032x}" for i in range(num_requests)]
    for id in ids:
        began_s = time.perf_counter()
        await door.submit([Request(id, tuple(range(50)))])
        times["submit"].append(time.perf_counter() - began_s)
        await link.call("attach", id, "default", "api", 0)
    assert len(await work.claim(num_requests)) == num_requests
    for step in range(num_steps):
        began_s = time.perf_counter()
        verdicts = await work.commit([Delta(id, step, (step,)) for id in ids])
        times["commit"].append(time.perf_counter() - began_s)
        assert not verdicts
    for name, taken in times.items():
        p99 = sorted(taken)[int(0.99 * len(taken))]
        about = f"of a step of {num_requests} requests" if name == "commit" else "of one request"
        print(f"{name} {about}: median {statistics.median(taken) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    await work.close()
    await link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.listen:
        listen(args.listen)
        return
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), appendonly=True) as server:
        mail = subprocess.Popen([sys.executable, "-m", "loadtests.commit", "--listen", server.url])
        try:
            asyncio.run(measure(server.url, args.requests, args.steps))
        finally:
            mail.kill()
            mail.wait()


if __name__ == "__main__":
    main()
