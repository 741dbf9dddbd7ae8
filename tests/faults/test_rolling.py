"""Everything is replaced, one after the other, while clients come and go; and nobody loses a token or an answer."""

import asyncio
import random

from tests.faults.client import Reading, resilient
from tests.faults.conftest import House
from tests.faults.history import assert_exact
from tests.faults.load import Load, attempts, bodies
from tests.faults.procs import Process

NUM_CLIENTS = 4


async def stop(process: Process) -> None:
    """SIGTERM, and its exit code is 0."""
    process.term()
    assert await asyncio.to_thread(process.exit_code) == 0


async def test_a_worker_that_stops_hands_over_without_using_up_attempts(house: House) -> None:
    first, _ = house.workers
    async with Load(house.cluster.ports, bodies(8, 250)) as load:
        await load.until_tokens(20)
        await stop(first)
        await load.all_exact(house.oracle)
        assert all(len(reading.parts) == 1 for reading in load.readings)
        assert attempts(house.redis, load.readings) == [1] * 8


async def test_everything_is_replaced_under_load(house: House) -> None:
    cluster, over = house.cluster, asyncio.Event()
    readings: list[Reading] = []

    async def client(i: int) -> None:
        rng = random.Random(i)
        while not over.is_set():
            readings.append(reading := Reading(rng.choice(bodies(8, rng.randrange(50, 250)))))
            await resilient(cluster.ports, reading.body, key=f"{i}-{len(readings)}", reading=reading)

    clients = [asyncio.create_task(client(i)) for i in range(NUM_CLIENTS)]
    old: list[Process] = [*house.workers, *house.apis]
    for start in (cluster.worker, cluster.api, cluster.worker, cluster.api):
        start("--drain-s", "0.5")
    await asyncio.to_thread(cluster.until_ready)
    for process in old:
        await stop(process)
    over.set()
    await asyncio.gather(*clients)
    assert_exact(readings, house.oracle)
    assert len(readings) > NUM_CLIENTS
    refused = [part.body for reading in readings for part in reading.parts if part.status not in (0, 200)]
    assert all(b"shutting down" in body for body in refused), refused
