"""What lies between the processes and Redis is slow, cuts them off, and swallows answers to what was done."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.client import ask, until
from tests.faults.conftest import House
from tests.faults.history import Unfailed, asked
from tests.faults.load import Load, bodies, num_known, num_take_overs
from tests.faults.procs import Cluster
from tests.faults.proxy import Proxy
from tests.faults.redis_server import RedisServer


@dataclass
class Network:
    """A house in which apis and workers reach Redis through a proxy each."""

    house: House
    before_apis: Proxy
    before_workers: Proxy

    def load(self, num: int, max_tokens: int) -> Load:
        return Load(self.house.cluster.ports, bodies(num, max_tokens))


@pytest.fixture(scope="module")
def shared_network(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, oracle: Unfailed) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        first, second = stack.enter_context(Proxy(redis.port, 1)), stack.enter_context(Proxy(redis.port, 2))
        cluster = stack.enter_context(Cluster(redis, model_folder, folder))
        urls = [f"redis://127.0.0.1:{proxy.port}/0" for proxy in (first, second)]
        yield Network(House(cluster, oracle, 1, 1, 0.5, *urls), first, second)


@pytest.fixture
def network(shared_network: Network) -> Iterator[Network]:
    """Nothing is wrong with it, and nothing of the requests before is left in Redis."""
    shared_network.house.redis.cli().flushall()
    with shared_network.house.lent():
        yield shared_network
        for proxy in (shared_network.before_apis, shared_network.before_workers):
            proxy.delay_s = proxy.jitter_s = proxy.reset_share = 0.0
            proxy.split = False
            proxy.refuse(False)


async def test_slow_in_single_bytes_and_with_jitter(network: Network) -> None:
    async with network.load(4, 60) as load:
        for proxy in (network.before_apis, network.before_workers):
            proxy.delay_s, proxy.jitter_s, proxy.split = 0.005, 0.03, True
        await load.all_exact(network.house.oracle)


async def test_connections_are_reset_all_the_time(network: Network) -> None:
    async with network.load(8, 150) as load:
        await load.until_tokens(5)
        for proxy in (network.before_apis, network.before_workers):
            proxy.reset_share = 0.02
        for _ in range(4):
            await load.until_tokens(20)
            network.before_apis.reset()
            network.before_workers.reset()
        network.before_apis.reset_share = network.before_workers.reset_share = 0.0
        await load.all_exact(network.house.oracle)
    assert num_known(network.house.redis) == 8, "a submission was executed twice"


@pytest.mark.parametrize("call", ["claim", "commit", "beat"])
async def test_what_a_worker_did_was_done_but_its_reply_is_lost(network: Network, call: str) -> None:
    network.before_workers.drop_replies(6 if call == "commit" else 2, after=f"millrace1_{call}".encode())
    before = network.before_workers.num_dropped
    async with network.load(8, 80) as load:
        await load.all_exact(network.house.oracle)
    assert network.before_workers.num_dropped >= before + 2


@pytest.mark.parametrize("call", ["submit", "attach", "attend"])
async def test_what_an_api_did_was_done_but_its_reply_is_lost(network: Network, call: str) -> None:
    network.before_apis.drop_replies(2, after=f"millrace1_{call}".encode())
    before = network.before_apis.num_dropped
    async with network.load(8, 150) as load:
        await load.all_exact(network.house.oracle)
    assert network.before_apis.num_dropped == before + 2
    assert num_known(network.house.redis) == 8


async def test_a_hiccup_of_the_connection_refuses_nobody(network: Network) -> None:
    """The first to come loses its connection on the way; those behind it find none, and wait until there is one."""
    network.before_apis.refuse(True)
    network.before_apis.reset()
    async with network.load(1, 60) as first:
        await asyncio.sleep(0.1)
        async with network.load(8, 60) as load:
            await asyncio.sleep(0.1)
            network.before_apis.refuse(False)
            await load.all_exact(network.house.oracle)
        await first.all_exact(network.house.oracle)


async def test_workers_in_a_black_hole_for_longer_than_their_leases(network: Network) -> None:
    async with network.load(8, 150) as load:
        await load.until_tokens(20)
        network.before_workers.black_hole(3.0)
        await until(lambda: network.house.cluster.num_announced() == 0, "their leases have run out")
        await load.all_exact(network.house.oracle)
    assert num_take_overs(network.house.redis, load.readings) >= 8


async def test_an_api_in_a_black_hole_keeps_its_clients_and_refuses_new_ones(network: Network) -> None:
    port = network.house.cluster.ports()[0]
    async with network.load(8, 150) as load:
        await load.until_tokens(20)
        network.before_apis.black_hole(3.0)
        told = await ask(port, "POST", "/generate", asked("a", 0, 5))
        assert told.status == 503
        async with network.load(4, 60) as new:  # refused at first; each comes back with its key
            await new.all_exact(network.house.oracle, statuses=(200, 503))
        await load.all_exact(network.house.oracle)
        assert all(len(reading.parts) == 1 for reading in load.readings)


async def test_a_lost_submission_that_is_sent_again_is_neither_lost_nor_cancelled(network: Network) -> None:
    """The door has told the client 503 and takes back what it may have submitted; the client's key comes again."""
    network.before_apis.refuse(True)
    network.before_apis.drop_replies(1, after=b"millrace1_submit")
    async with network.load(8, 100) as load:
        await until(lambda: any(503 in reading.statuses for reading in load.readings), "clients are told to come again")
        assert num_known(network.house.redis) >= 1, "none was executed"
        network.before_apis.refuse(False)
        await load.all_exact(network.house.oracle, statuses=(200, 503))
