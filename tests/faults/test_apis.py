"""API processes die and stop, and clients leave, stall and come back: to each its own stream, and nothing is left."""

import asyncio
import json
import random
import time

from tests.faults.client import Part, Reading, ask, connect, leave, read_part, replay, until
from tests.faults.conftest import House
from tests.faults.history import asked, assert_exact
from tests.faults.load import Load, bodies, num_running

NUM_LEAVERS = 120


async def test_kill9_of_an_api_and_its_clients_read_on_at_another(house: House) -> None:
    victim, _ = house.apis
    async with Load(house.cluster.ports, bodies(12, 200)) as load:
        await load.until_tokens(30)
        victim.kill9()
        await load.all_exact(house.oracle)
    cut = [reading for reading in load.readings if len(reading.parts) > 1]
    assert cut and all(reading.parts[0].port == victim.port for reading in cut)


async def test_an_api_that_stops_hands_its_streams_over_in_order(house: House) -> None:
    victim, other = house.apis
    async with Load(house.cluster.ports, bodies(12, 200)) as load:
        await load.until_tokens(30)
        victim.term()
        await until(lambda: victim.status("/health", 0.2) == 0, "its port is closed")
        assert await asyncio.to_thread(victim.exit_code) == 0
        await load.all_exact(house.oracle)
    first = [reading.parts[0] for reading in load.readings if len(reading.parts) > 1]
    assert first and all((part.broken, part.retry_ms) == (None, 200) for part in first)
    assert {reading.parts[-1].port for reading in load.readings} == {other.port}


async def test_streams_that_nobody_reads_on_are_given_up(house: House) -> None:
    victim = house.cluster.api("--orphan-s", "1")
    await asyncio.to_thread(house.cluster.until_ready)
    # Long enough that only a cancellation ends them within the time that the house is given to be clean.
    async with Load(lambda: [victim.port], bodies(8, 900), give_up_s=0) as load:
        await load.until_tokens(5)
        victim.kill9()
        await until(lambda: num_running(house.redis) == 0, "they were cancelled")


async def test_every_reader_from_every_position_gets_the_same_bytes(house: House) -> None:
    (body,) = bodies(1, 200, resumable=True)
    async with Load(house.cluster.ports, [body]) as load:
        await load.until_any(10)
        (first,) = load.readings
        places = [
            (port, f"{first.id}:{n}" if n else "") for port in house.cluster.ports() for n in (0, 1, 7, 60, 199, 200)
        ]
        others = await asyncio.gather(*(replay(port, first.id, after) for port, after in places))
        await load.all_exact(house.oracle)
    late = [await replay(port, first.id, after) for port, after in places]
    for reading, (_, after) in zip([*others, *late], places * 2, strict=True):
        assert (reading.violations, reading.done) == ([], True)
        assert reading.data() == first.data()[int(after.rpartition(":")[2] or 0) :]


async def test_departures_in_every_state_leave_nothing_behind(house: House) -> None:
    rng = random.Random(1)

    async def visitor(i: int) -> None:
        fields = asked("x" * rng.choice([1, 90, 500]), i % 4, rng.choice([1, 30, 150]), stream=rng.random() < 0.8)
        body = json.dumps(fields).encode()
        reader, writer = await connect(rng.choice(house.cluster.ports()), "POST", "/generate", body)
        match rng.randrange(4):
            case 0:  # at once: sending, being submitted
                await asyncio.sleep(rng.random() * 0.02)
            case 1:  # the head is there: queued, prefilling
                await reader.readuntil(b"\r\n\r\n")
            case 2:  # tokens have come
                await reader.read(rng.randrange(1, 20_000))
            case 3:  # all of it has come
                await reader.read()
        await leave(writer)

    await asyncio.gather(*(visitor(i) for i in range(NUM_LEAVERS)))
    began_s = time.monotonic()
    await until(lambda: num_running(house.redis) == 0, "every seat is free")
    print(f"seats free after {time.monotonic() - began_s:.2f} s")


async def test_slow_readers_hold_up_nobody_and_miss_nothing(house: House) -> None:
    port, go = house.cluster.ports()[0], asyncio.Event()
    heavy = asked("Once upon a time", 0, 250, n=4, logprobs=20)
    slow = [Reading(heavy | {"stream": True}) for _ in range(2)]

    async def read(reading: Reading) -> Part:
        body = json.dumps(reading.body).encode()
        return await read_part(port, "POST", "/generate", body, take=reading.take, wait_for=go)

    late = [asyncio.create_task(read(reading)) for reading in slow]
    await until(lambda: num_running(house.redis) == 8, "they are being computed")
    async with Load(lambda: [port], bodies(8, 100)) as load:
        await load.all_exact(house.oracle)
    await until(lambda: num_running(house.redis) == 0, "nobody waits for the slow ones")
    go.set()
    parts = await asyncio.gather(*late)
    assert [part.broken for part in parts] == [None] * 2
    assert_exact(slow, house.oracle)
    assert all([len(ids) for ids in reading.token_ids] == [250] * 4 for reading in slow)


async def test_a_background_request_needs_no_reader_and_a_deleted_one_ends(house: House) -> None:
    first, second = house.cluster.ports()
    told = await ask(first, "POST", "/generate", asked("Once upon a time", 0, 150, background=True))
    assert told.status == 202
    unwanted = await ask(first, "POST", "/generate", asked("Once upon a time", 0, 900, background=True))
    assert (await ask(second, "DELETE", json.loads(unwanted.body)["url"])).status == 202
    ended = await replay(second, json.loads(unwanted.body)["id"])
    assert ended.terminal is not None and ended.terminal["choices"][0]["finish_reason"] == "cancelled"
    reading = await replay(second, json.loads(told.body)["id"])
    reading.body = asked("Once upon a time", 0, 150)
    assert_exact([reading], house.oracle)
