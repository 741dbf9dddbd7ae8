"""Workers die, freeze and hang at every moment there is, and no client notices more than a pause."""

import asyncio

import psutil
import pytest

from tests.faults.client import Reading, resilient, until
from tests.faults.conftest import House
from tests.faults.history import asked, complaints
from tests.faults.load import Load, bodies, num_take_overs
from tests.faults.procs import Toy
from tests.faults.toy import POISON

STALL_S = 6.0  # lease, a look at the leases, and prefilling again, on a machine that does other things too
LONG = "y" * 500  # several of it are more than one step computes


async def started(house: House, *flags: str, num: int = 1) -> list[Toy]:
    """Toys around real engines, at work."""
    toys = [house.cluster.toy("--engine", "real", *flags) for _ in range(num)]
    await asyncio.to_thread(house.cluster.until_ready)
    return toys


async def test_kill9_of_engines_keepers_and_both_in_the_middle_of_decoding(house: House) -> None:
    cluster = house.cluster
    async with Load(cluster.ports, bodies(16, 400)) as load:
        await load.until_tokens(20)
        cluster.workers[-1].kill_engine()
        await load.until_tokens(20)
        cluster.workers[-2].kill9()  # its engine dies with it
        fresh = cluster.worker()
        await load.until_tokens(20)
        cluster.workers[-2].kill_both()
        await asyncio.to_thread(cluster.until_ready)
        await load.until_tokens(20)
        fresh.kill_engine()
        await load.all_exact(house.oracle)
        assert num_take_overs(house.redis) >= 16
        assert load.longest_gap_s() < STALL_S


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
    asked_for = [asked(prompt, seed, 80 + 10 * seed) for seed in range(8)]
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, asked_for) as load:
            await until(lambda: not toy.alive(), f"it died at {place}")
            thaw()
            await load.all_exact(house.oracle)
    assert f"failpoint kill:{place}" in toy.said()
    assert num_take_overs(house.redis) >= 1


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
    async with Load(house.cluster.ports, bodies(16, 400)) as load:
        for worker in (first, second):
            await load.until_tokens(20)
            worker.freeze()
            await until(lambda: house.cluster.num_announced() == 1, "its lease has run out")
            await load.until_tokens(20)
            worker.thaw()
            await asyncio.to_thread(house.cluster.until_ready)
        await load.all_exact(house.oracle)
        assert load.longest_gap_s() < STALL_S


async def test_a_hung_engine_takes_itself_out(house: House) -> None:
    (toy,) = await started(house, "--fail", "hang:compute", "--at", "30", "--stuck-s", "1")
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, bodies(8)) as load:
            await until(lambda: not toy.alive(), "its watchdog ended it")
            thaw()
            await load.all_exact(house.oracle)
    assert toy.exit_code() == 1
    assert "no progress" in toy.said()


async def test_poison_is_given_up_after_four_crashes_and_harms_nobody_else(house: House) -> None:
    toys = await started(house, "--fail", "kill:poison", "--at", "20", num=5)
    poison = Reading(asked([*POISON, 1, 2], 1, 100))
    with house.frozen_workers() as thaw:
        async with Load(house.cluster.ports, bodies(8)) as load:
            await resilient(house.cluster.ports, poison.body, key="poison", reading=poison)
            thaw()
            await load.all_exact(house.oracle)
    assert complaints(poison, house.oracle, reason="error") == []
    assert poison.terminal is not None and "engine" in poison.terminal["error"]["detail"]
    assert sum(not toy.alive() for toy in toys) in (4, 5)  # 5: the last commit before the first crash came through late
    assert house.redis.cli().xlen("millrace:{0}:dead") == 1
