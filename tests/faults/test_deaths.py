"""Workers die and freeze at every moment there is, and no client notices more than a pause."""

import asyncio
import re

import psutil
import pytest

from tests.faults.client import Reading, resilient, until
from tests.faults.conftest import House
from tests.faults.history import asked, complaints, frames
from tests.faults.load import Load, bodies, num_take_overs
from tests.faults.procs import Toy, runs
from tests.faults.toy import POISON

LONG = "y" * 700  # more than one step computes


async def started(house: House, *flags: str, num: int = 1) -> list[Toy]:
    """Toys around real engines, at work."""
    toys = [house.cluster.toy("--engine", "real", *flags) for _ in range(num)]
    await asyncio.to_thread(house.cluster.until_ready)
    return toys


async def test_kill9_of_engines_keepers_and_both_in_the_middle_of_decoding(house: House) -> None:
    first, second = house.workers
    orphan = first.engine()
    async with Load(house.cluster.ports, bodies(8, 250)) as load:
        await load.until_tokens(20)
        second.kill_engine()
        await load.until_tokens(20)
        first.kill9()
        house.cluster.worker()
        await until(lambda: not runs(orphan), "its engine has ended with it")
        await load.until_tokens(20)
        second.kill_both()
        await load.all_exact(house.oracle)
    async with Load(house.cluster.ports, bodies(8, 250)) as unfailed:
        await unfailed.all_exact(house.oracle)
    assert [*map(frames, load.readings)] == [*map(frames, unfailed.readings)]
    assert re.search("ended with -9; its [0-9] requests are back in the queue", second.said())
    assert num_take_overs(house.redis, load.readings) >= 1  # how many depends on who had claimed them
    assert all(len(reading.parts) == 1 for reading in load.readings)
    print(f"longest gap {load.longest_gap_s():.2f} s")


@pytest.mark.parametrize(
    ("place", "at", "prompt"),
    [
        ("claim", 1, "a"),  # in Redis it is claimed, and nobody has heard of it
        ("prefill", 1, LONG),  # computed a part of the prompts
        ("compute", 30, "a"),  # drawn, but not handed over
        ("sent", 30, "a"),  # committed, and nobody has heard of it
        ("final", 1, "a"),  # the same, with the end in it
    ],
)
async def test_kill9_at_a_chosen_place(house: House, place: str, at: int, prompt: str) -> None:
    (toy,) = await started(house, "--fail", f"kill:{place}", "--at", str(at))
    asked_for = [asked(prompt, i % 2, 60 + 10 * i) for i in range(8)]
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, asked_for) as load:
            await until(lambda: not toy.alive(), f"it died at {place}")
            thaw()
            await load.all_exact(house.oracle)
    assert f"failpoint kill:{place}" in toy.said()
    assert num_take_overs(house.redis, load.readings) >= 1


async def test_a_zombie_is_refused_and_works_on(house: House) -> None:
    (toy,) = await started(house, "--fail", "stop:commit", "--at", "30")
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, bodies(8)) as load:
            await until(lambda: psutil.Process(toy.pid).status() == psutil.STATUS_STOPPED, "it froze itself")
            thaw()
            await load.until_tokens(40)  # longer than its lease, and they were taken over
            toy.thaw()
            await load.all_exact(house.oracle)
    await until(lambda: "refused 8" in toy.said(), "all eight were refused")
    async with Load(house.cluster.ports, bodies(8, 50)) as load:
        await load.all_exact(house.oracle)
    assert toy.alive()


async def test_frozen_workers_come_back_without_harm(house: House) -> None:
    first, second = house.workers
    async with Load(house.cluster.ports, bodies(8, 250)) as load:
        for worker in (first, second):
            await load.until_tokens(20)
            worker.freeze()
            await until(lambda: house.cluster.num_announced() == 1, "its lease has run out")
            await load.until_tokens(20)
            worker.thaw()
            await asyncio.to_thread(house.cluster.until_ready)
        await load.all_exact(house.oracle)
        print(f"longest gap {load.longest_gap_s():.2f} s")


async def test_poison_is_given_up_after_four_crashes_and_harms_nobody_else(house: House) -> None:
    toys = await started(house, "--fail", "kill:poison", "--at", "20", num=5)

    async def keep(toy: Toy) -> None:
        await until(lambda: not toy.alive(), "the poison has reached it", 120)
        await asyncio.to_thread(toy.hand_back)

    keepers = [asyncio.create_task(keep(toy)) for toy in toys]
    poison = Reading(asked([*POISON, 1, 2], 1, 100))
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, bodies(8, 100)) as load:
            await resilient(house.cluster.ports, poison.body, key="poison", reading=poison)
            thaw()
            await load.all_exact(house.oracle)
    assert complaints(poison, house.oracle, reason="error") == []
    assert poison.terminal is not None and "engine" in poison.terminal["error"]["detail"]
    assert [toy.alive() for toy in toys].count(False) == 4
    assert house.redis.cli().xlen("millrace:{0}:dead") == 1
    for keeper in keepers:
        keeper.cancel()
