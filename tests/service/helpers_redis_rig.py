"""The Redis broker as a rig of the contract suite: a real redis-server, one door, one worker, and a clock to move.

Time passes by moving the protocol's own clock, a second at a time, with everything done that is done every second: the
worker's heartbeat, the reader's attendance, the reaping.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.broker.redis import PREFIX, Link, WorkerInfo
from service.broker.redis_requests import RedisRequests
from service.broker.redis_work import RedisWork
from tests.service.helpers_redis import redis_server
from tests.service.helpers_rig import Limits, Rig

INFO = WorkerInfo("queue", "door", "weights", "float32", 128)


@asynccontextmanager
async def redis(limits: Limits) -> AsyncIterator[Rig]:
    """Skips, or fails where that is not allowed, if there is no redis-server."""
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as server:
        links = [Link(server.url, may_load=True), Link(server.url)]
        for link in links:
            await link.open()
        worker = RedisWork(links[0], "worker", INFO)
        requests = RedisRequests(
            links[1], lambda: "queue", limits.max_waiting, limits.max_waiting_tokens, limits.keep_s, limits.weights
        )
        await worker.open()
        await requests.open()
        cli = server.cli()

        async def pass_time(seconds: float) -> None:
            await asyncio.sleep(0.02)
            while seconds > 0:
                cli.hincrby(PREFIX + "clock", "ms", int(min(1.0, seconds) * 1000))
                seconds -= 1.0
                await worker._beat()
                await requests._attend([m for m in requests._all() if m.early is None], at_once=False)
                await links[1].call("reap")

        yield Rig(requests, worker, time.time, pass_time, retries=True)
        await requests.close()
        await worker.close()
        for link in links:
            await link.close()
