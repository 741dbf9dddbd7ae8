"""The books balance, whoever dies: what came in has ended in some way, or is in flight."""

import asyncio
from collections import Counter

from tests.faults.client import until
from tests.faults.conftest import House
from tests.faults.load import Load, bodies
from tests.faults.procs import Api

QUEUE = ("millrace_requests_waiting", "millrace_requests_running")


def ended(told: dict[str, float], family: str) -> Counter[str]:
    """By outcome."""
    found = {name.split('"')[1]: n for name, n in told.items() if name.startswith(f"{family}_ended_total")}
    assert found, f"{family} tells of no ends"
    return Counter({outcome: int(n) for outcome, n in found.items()})


def difference(api: Api) -> tuple[float, float]:
    """What is missing in its own books, and in those of the queue as it tells them."""
    told = api.metrics()
    own = told["millrace_requests_accepted_total"] - told["millrace_requests_in_flight"]
    of_all = told["millrace_queue_accepted_total"] - sum(told[name] for name in QUEUE)
    return own - ended(told, "millrace_requests").total(), of_all - ended(told, "millrace_queue").total()


async def test_the_books_balance_while_an_engine_and_an_api_are_killed(house: House) -> None:
    first, second = house.apis
    before = await asyncio.to_thread(first.metrics)
    async with Load(lambda: [first.port], bodies(8, 250)) as load:
        await load.until_tokens(10)
        assert await asyncio.to_thread(difference, first) == (0, 0)
        house.workers[0].kill_engine()
        await load.until_tokens(20)
        assert await asyncio.to_thread(difference, first) == (0, 0)
        await load.all_exact(house.oracle)
    async with Load(house.cluster.ports, bodies(8, 250)) as load:
        await load.until_tokens(10)
        await asyncio.to_thread(second.kill9)
        await load.all_exact(house.oracle)
    after = await asyncio.to_thread(first.metrics)
    new = after["millrace_queue_accepted_total"] - before["millrace_queue_accepted_total"]
    assert new == 16 == (ended(after, "millrace_queue") - ended(before, "millrace_queue")).total()
    await until(lambda: difference(first) == (0, 0), "the books balance")
