"""Redis dies, freezes, fills up, forgets everything and loses its functions. Whoever is connected still gets it all."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.faults.client import Part, ask, until
from tests.faults.conftest import House, MakeRedis
from tests.faults.history import asked
from tests.faults.leaks import assert_clean
from tests.faults.load import Load, bodies
from tests.faults.procs import Cluster
from tests.faults.redis_server import FAKETIME

SMALL = asked("Once upon a time", 0, 5)


async def refused(port: int) -> Part:
    """A new request's 503 that says when to come back, while Redis is as it is."""
    told = await ask(port, "POST", "/generate", SMALL)
    assert told.status == 503, (told.status, told.body)
    assert int(told.head.headers["retry-after"]) >= 1 if told.head else False
    print(f"refused after {told.ended_s - told.sent_s:.2f} s")
    return told


async def accepted(port: int) -> bool:
    return (await ask(port, "POST", "/generate", SMALL)).status == 200


def connected_all_along(load: Load) -> bool:
    """No client had to come back."""
    return all(len(reading.parts) == 1 for reading in load.readings)


async def test_redis_is_killed_and_comes_back_with_its_data(house: House) -> None:
    async with Load(house.cluster.ports, bodies(8)) as load:
        await load.until_tokens(30)
        house.redis.kill9()
        for api in house.apis:
            await refused(api.port)
            assert api.status("/health") == 200
        house.redis.restart()
        await load.all_exact(house.oracle)
        assert connected_all_along(load)


async def test_redis_loses_everything_and_nobody_connected_notices(house: House) -> None:
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, bodies(8, 100)) as waiting:
            await until(lambda: len(house.redis.cli().keys("millrace:{0}:r:*")) >= 8, "they are queued")
            thaw()
            async with Load(house.cluster.ports, bodies(8)) as load:
                await load.until_tokens(30)
                house.redis.restart(keep_data=False)
                await load.all_exact(house.oracle)
                await waiting.all_exact(house.oracle)
                assert connected_all_along(load) and connected_all_along(waiting)


async def test_redis_is_full_new_ones_are_refused_and_running_ones_finish(house: House) -> None:
    port = house.cluster.ports()[0]
    async with Load(house.cluster.ports, bodies(8)) as load:
        await load.until_tokens(20)
        house.redis.fill()
        known = len(house.redis.cli().keys("millrace:{0}:r:*"))
        await refused(port)
        await load.all_exact(house.oracle)
        assert len(house.redis.cli().keys("millrace:{0}:r:*")) == known
        house.redis.empty()
        assert await accepted(port)
        assert connected_all_along(load)


async def test_redis_freezes_for_longer_than_a_lease(house: House) -> None:
    async with Load(house.cluster.ports, bodies(8)) as load:
        await load.until_tokens(20)
        house.redis.stop()
        await refused(house.cluster.ports()[0])
        await until(lambda: house.apis[0].status("/ready") == 503, "it is told")
        await asyncio.sleep(2 * house.cluster.lease_s)  # the fault itself, not a wait for anything
        house.redis.cont()
        await load.all_exact(house.oracle)
        assert connected_all_along(load)


async def test_connections_are_killed_and_functions_flushed_again_and_again(house: House) -> None:
    async with Load(house.cluster.ports, bodies(8)) as load:
        for _ in range(4):
            await load.until_tokens(20)
            for kind in ("normal", "pubsub"):
                house.redis.cli().client_kill_filter(_type=kind)
            house.redis.cli().function_flush("SYNC")
        await load.all_exact(house.oracle)
        assert connected_all_along(load)


@pytest.fixture
def clocked(make_redis: MakeRedis, house: House) -> Iterator[Cluster]:
    """A small cluster on a Redis whose clock can be moved."""
    server = make_redis(clock=True)
    with Cluster(server, house.cluster.model, server.folder) as cluster:
        cluster.api()
        cluster.worker()
        cluster.until_ready()
        yield cluster
        assert_clean(cluster)


@pytest.mark.skipif(FAKETIME is None and os.environ.get("REQUIRE_REDIS") != "1", reason="libfaketime is not installed")
async def test_the_clock_of_redis_jumps_by_an_hour_there_and_back(clocked: Cluster, house: House) -> None:
    async with Load(clocked.ports, bodies(8, timeout_s=600)) as load:
        for offset_s in (3600, 0, -3600, 0):
            await load.until_tokens(20)
            clocked.redis.set_clock(offset_s)
        await load.all_exact(house.oracle)
        assert connected_all_along(load)
        print(f"longest gap {load.longest_gap_s():.2f} s")
