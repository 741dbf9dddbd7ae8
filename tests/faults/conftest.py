"""What the fault tests share: a redis-server, a model whose streams last long enough to be broken, and its oracle.

Without a redis-server they are skipped, and the end of the run says so; with REQUIRE_REDIS=1, as in CI, they fail.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.faults.history import Unfailed
from tests.faults.leaks import assert_clean
from tests.faults.procs import Api, Cluster, Worker
from tests.faults.redis_server import RedisServer, missing
from tests.model.conftest import TINY, random_decoder, save_folder

HERE = Path(__file__).parent
# About 4 ms a step on one core: 300 tokens last a second and more, which is long for a fault.
STORYTELLER = replace(TINY, hidden_size=128, num_layers=8, max_position=1024)
HANG_S = 300  # on a machine that has other things to do too
MISSING = missing()
REQUIRED = os.environ.get("REQUIRE_REDIS") == "1"
MakeCluster = Callable[..., Cluster]
MakeRedis = Callable[..., RedisServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a fault test, and needs Redis."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(HANG_S))
            if MISSING and not REQUIRED:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session", autouse=True)
def required_redis() -> None:
    """Where Redis must be, its lack is no reason to skip."""
    assert not MISSING, MISSING


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and the byte tokenizer: 256 ids, no end of sequence."""
    return save_folder(random_decoder(STORYTELLER), tmp_path_factory.mktemp("model") / "storyteller")


@pytest.fixture(scope="session")
def oracle(model_folder: Path) -> Unfailed:
    """The unfailed runs, shared by all tests."""
    return Unfailed(model_folder, 250)


@pytest.fixture
def make_redis(tmp_path: Path) -> Iterator[MakeRedis]:
    """Servers that are gone after the test."""
    with ExitStack() as stack:
        made = 0

        def make(**options: object) -> RedisServer:
            nonlocal made
            made += 1
            return stack.enter_context(RedisServer(tmp_path / f"redis-{made}", **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def redis_server(make_redis: MakeRedis) -> RedisServer:
    """One that forgets everything when it is killed."""
    return make_redis()


@dataclass
class House:
    """A cluster that several tests share: before each it is made whole again, after each it must be clean."""

    cluster: Cluster
    oracle: Unfailed
    num_apis: int = 2
    num_workers: int = 2
    drain_s: float = 0.5
    api_url: str = ""
    worker_url: str = ""

    @property
    def redis(self) -> RedisServer:
        return self.cluster.redis

    @property
    def apis(self) -> list[Api]:
        """Those that run."""
        return [api for api in self.cluster.apis if api.alive()]

    @property
    def workers(self) -> list[Worker]:
        """Those that run."""
        return [worker for worker in self.cluster.workers if worker.alive()]

    def restore(self) -> None:
        """Start what is missing, end what is too much, wait until all of it is ready."""
        for extra in (*self.cluster.toys, *self.apis[self.num_apis :], *self.workers[self.num_workers :]):
            extra.clear()
        while len(self.apis) < self.num_apis:
            self.cluster.api("--drain-s", str(self.drain_s), redis_url=self.api_url)
        while len(self.workers) < self.num_workers:
            self.cluster.worker("--drain-s", str(self.drain_s), redis_url=self.worker_url)
        self.cluster.until_ready()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For one test: whole before it, clean after it. What the processes said is printed, for its report."""
        self.restore()
        fds = {api.name: api.num_fds() for api in self.apis}
        try:
            yield
        finally:
            for log in sorted(self.cluster.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        assert_clean(self.cluster, fds)
        assert not any("Traceback" in api.said() for api in self.cluster.apis)

    @contextmanager
    def frozen_workers(self) -> Iterator[Callable[[], None]]:
        """Its workers do nothing until the end, or until what this yields is called."""
        workers = self.workers

        def thaw() -> None:
            for worker in workers:
                worker.thaw()

        for worker in workers:
            worker.freeze()
        try:
            yield thaw
        finally:
            thaw()


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, oracle: Unfailed) -> Iterator[House]:
    """Two apis and two workers on a Redis that keeps its data."""
    folder = tmp_path_factory.mktemp("house")
    with RedisServer(folder / "redis", appendonly=True) as redis, Cluster(redis, model_folder, folder) as cluster:
        yield House(cluster, oracle)


@pytest.fixture
def house(shared_house: House) -> Iterator[House]:
    """The shared one, whole; clean after the test."""
    with shared_house.lent():
        yield shared_house
