"""Redis loses the end of a log, and the request ends before the process that reads it has looked: its readers come to
an end all the same, and keep what they have."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from model.request import Delta, FinishReason
from service.broker.base import CANCELLED
from service.broker.redis import PREFIX, Link
from service.broker.redis_requests import RedisRequests
from service.broker.redis_work import RedisWork
from tests.service.helpers_broker import STOP, Reader, ask, ending, reading, token_ids
from tests.service.helpers_redis import redis_server
from tests.service.helpers_redis_rig import INFO


class Lossy:
    """A reader has two ids, and Redis knows nothing of them any more."""

    def __init__(self, worker: RedisWork, requests: RedisRequests, cli: "redis.Redis") -> None:
        self.worker, self.requests, self._cli = worker, requests, cli

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[Reader]:
        await self.requests.submit([ask("a")])
        await self.worker.claim(1)
        async with reading(self.requests, "a") as reader:
            await self.worker.commit([Delta("a", 0, (7, 8))])
            await reader.got(2)
            self._cli.delete(PREFIX + "o:a")
            self._cli.hset(PREFIX + "r:a", mapping={"n": 0, "mb": ""})  # nor who reads: the end's mail is lost, too
            yield reader


@pytest.fixture
async def lossy(tmp_path: Path) -> AsyncIterator[Lossy]:
    with redis_server(tmp_path) as server:
        links = [Link(server.url, may_load=True), Link(server.url)]
        for link in links:
            await link.open()
        requests = RedisRequests(links[1], lambda: "queue", 9, 999)
        await requests.open()
        yield Lossy(RedisWork(links[0], "w", INFO), requests, server.cli())
        await requests.close()
        for link in links:
            await link.close()


async def test_an_end_with_fewer_ids_ends_what_was_read(lossy: Lossy) -> None:
    async with lossy.reader() as reader:
        await lossy.worker.abandon(["a"])
        await lossy.requests.cancel("a", "default")
        log = await reader.log()
    assert (token_ids(log), ending(log)) == ([7, 8], CANCELLED)


async def test_an_end_with_other_ids_is_told_as_an_error(lossy: Lossy) -> None:
    async with lossy.reader() as reader:
        await lossy.worker.abandon(["a"])
        await lossy.worker.claim(1)
        await lossy.worker.commit([Delta("a", 0, (1, 2, 3), finish=STOP)])  # as in bfloat16, and all at once
        log = await reader.log()
    assert (token_ids(log), ending(log).reason) == ([7, 8], FinishReason.ERROR)
