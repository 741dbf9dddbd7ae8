"""Streams under way while a test breaks things: started together, looked at while they grow, compared in the end."""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.faults.client import RETRY_S, Ports, Reading, replay, resilient, until
from tests.faults.history import Oracle, asked, assert_exact
from tests.faults.redis_server import RedisServer

PROMPTS = ("Once upon a time", "The road to the town was long.", "x" * 90, "Ä ö ü: 日本語, and so on")
SEEDS = 2


def bodies(num: int, max_tokens: int = 150, **fields: object) -> list[dict[str, Any]]:
    """So many requests of few kinds, so that the unfailed run of each need not be computed anew."""
    kinds = itertools.islice(itertools.cycle(itertools.product(PROMPTS, range(SEEDS))), num)
    return [asked(prompt, seed, max_tokens, **fields) for prompt, seed in kinds]


class Load:
    """`async with Load(ports, bodies) as load`. Each client tries the ports from one of its own on."""

    def __init__(self, ports: Ports, asked_for: Sequence[dict[str, Any]], give_up_s: float = 60.0) -> None:
        self.readings = [Reading(body) for body in asked_for]
        self._ports, self._give_up_s = ports, give_up_s
        self._tasks: list[asyncio.Task[Reading]] = []

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._read(reading)) for reading in self.readings]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reading in self.readings if error is not None else []:
            ends = [(part.port, part.status, part.broken or part.body[:200]) for part in reading.parts[-2:]]
            print(reading.id, reading.num_tokens, reading.terminal, reading.violations, ends)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_open(self) -> int:
        return sum(not task.done() for task in self._tasks)

    async def until_tokens(self, num: int) -> None:
        """Until every stream has so many tokens more than now, or has ended."""
        before = [reading.num_tokens for reading in self.readings]

        def grown() -> bool:
            pairs = zip(self.readings, before, strict=True)
            return all(reading.terminal is not None or reading.num_tokens >= n + num for reading, n in pairs)

        await until(grown, f"{num} more tokens in each stream")

    async def until_any(self, num: int) -> None:
        """Until some stream has so many tokens."""
        await until(lambda: any(reading.num_tokens >= num for reading in self.readings), f"a stream with {num} tokens")

    async def all_exact(self, oracle: Oracle, statuses: tuple[int, ...] = (200,)) -> None:
        """Wait for all, compare all, and see to it that no answer had another status than these. Then read all of it
        again: the bytes of every event must be those that came while things were failing."""
        await asyncio.gather(*self._tasks)
        assert_exact(self.readings, oracle)
        told = {status for reading in self.readings for status in reading.statuses}
        assert told <= set(statuses), told
        again = await asyncio.gather(*(self._read_again(reading.id) for reading in self.readings))
        for first, second in zip(self.readings, again, strict=True):
            assert (second.violations, second.statuses) == ([], [200]), (second.violations, second.parts[-1])
            pairs = itertools.zip_longest(first.data(), second.data())
            changed = [pair for pair in pairs if pair[0] != pair[1]]
            assert not changed, f"{len(changed)} events of {first.id} changed, the first of them: {changed[0]}"

    async def _read_again(self, id: str) -> Reading:
        """Whole. An API that has not found Redis again yet says 503, and to come back."""
        until_s = time.monotonic() + self._give_up_s
        while True:
            reading = await replay(self._ports()[-1], id)
            if reading.statuses != [503] or time.monotonic() > until_s:
                return reading
            await asyncio.sleep(RETRY_S)

    def longest_gap_s(self) -> float:
        """The longest that any client had to wait between two events."""
        return max(reading.longest_gap_s() for reading in self.readings)

    async def _read(self, reading: Reading) -> Reading:
        first, key = random.randrange(1000), secrets.token_hex(8)

        def ports() -> list[int]:
            all_ports = list(self._ports())
            at = first % len(all_ports) if all_ports else 0
            return all_ports[at:] + all_ports[:at]

        return await resilient(ports, reading.body, key=key, give_up_s=self._give_up_s, reading=reading)


def attempts(redis: RedisServer, readings: Sequence[Reading]) -> list[int]:
    """How often each of these requests was claimed."""
    return [int(redis.cli().hget(f"millrace:{{0}}:r:{reading.id}", "at") or 0) for reading in readings]


def num_take_overs(redis: RedisServer, readings: Sequence[Reading]) -> int:
    """Claims beyond the first of each of these requests."""
    return sum(max(0, num - 1) for num in attempts(redis, readings))


def num_running(redis: RedisServer) -> int:
    """Requests that some worker holds, as Redis sees it."""
    cli = redis.cli()
    return sum(int(cli.hget(key, "running") or 0) for key in cli.scan_iter("millrace:{0}:q:*"))


def num_known(redis: RedisServer) -> int:
    """Requests that Redis knows, ended ones that it still keeps included."""
    return sum(1 for _ in redis.cli().scan_iter("millrace:{0}:r:*", count=1000))
