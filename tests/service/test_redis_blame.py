"""How much the death of an engine counts against what it computed: enough for poison to be given up, too little for
what only stood beside it. Redis alone has other engines to try."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from model.request import Delta, FinishReason
from service.broker.redis import Link, hand_back
from service.broker.redis_requests import RedisRequests
from service.broker.redis_work import RedisWork
from tests.service.helpers_broker import ask, read, reason
from tests.service.helpers_redis import redis_server
from tests.service.helpers_redis_rig import INFO

TO_GUILTY = {True: 4, False: 12}  # deaths at one place that convict: the engine's own failures, and kills


class Deaths:
    """One engine after the other computes, and dies."""

    def __init__(self, url: str, link: Link, requests: RedisRequests) -> None:
        self._url, self._link, self.requests = url, link, requests
        self._num = 0

    async def die(self, *failed: bool, num_tokens: int = 0) -> None:
        """So many engines claim what there is, commit `num_tokens` more of each request in steps of one, and die."""
        for each in failed:
            self._num += 1
            worker = RedisWork(self._link, f"w{self._num}", INFO)
            for job in await asyncio.wait_for(worker.claim(9), 20):
                for i in range(num_tokens):
                    await worker.commit([Delta(job.request.id, len(job.so_far) + i, (7,))])
            assert await asyncio.to_thread(hand_back, self._url, f"w{self._num}", each) > 0


@asynccontextmanager
async def deaths(folder: Path) -> AsyncIterator[Deaths]:
    with redis_server(folder) as server:
        links = [Link(server.url, may_load=True), Link(server.url)]
        for link in links:
            await link.open()
        requests = RedisRequests(links[1], lambda: "queue", 9, 999)
        await requests.open()
        yield Deaths(server.url, links[0], requests)
        await requests.close()
        for link in links:
            await link.close()


async def test_poison_is_given_up_after_four_failures(tmp_path: Path) -> None:
    async with deaths(tmp_path) as engines:
        await engines.requests.submit([ask("a")])
        await engines.die(*[True] * TO_GUILTY[True])
        assert reason(await read(engines.requests, "a")) == FinishReason.ERROR


async def test_a_kill_counts_a_third_of_a_failure(tmp_path: Path) -> None:
    async with deaths(tmp_path) as engines:
        await engines.requests.submit([ask("a", max_tokens=9)])
        await engines.die(*[False] * (TO_GUILTY[False] - 1))
        assert (await engines.requests.load()).num_waiting == 1
        await engines.die(False)
        assert reason(await read(engines.requests, "a")) == FinishReason.ERROR


async def test_who_gets_on_is_not_to_blame(tmp_path: Path) -> None:
    async with deaths(tmp_path) as engines:
        await engines.requests.submit([ask("a", max_tokens=99)])
        await engines.die(*[True] * 8, num_tokens=3)
        assert (await engines.requests.load()).num_waiting == 1
