"""A redis-server as deploy/redis sets it up: its users can do what their programs do, and nothing beyond."""

import asyncio
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import redis

from model.request import Delta, FinishReason
from service.broker.base import Verdict
from service.broker.redis import PREFIX, PROTOCOL, Link, check, hand_back, source
from service.broker.redis_requests import RedisRequests
from service.broker.redis_work import RedisWork
from service.cli import main
from service.errors import StartupError, Unavailable
from tests.faults.redis_server import START_S, RedisServer
from tests.service.helpers_broker import HANG_S, STOP, ask, read, reading, reason, token_ids, verdicts
from tests.service.helpers_redis import need_redis
from tests.service.helpers_redis_rig import INFO

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
USERS = ("admin", "api", "worker")
FUNCTION = f"millrace{PROTOCOL}_"
# What a program tries and may do without: loading where it may not, and a name for its connection, since Redis 7.2.
TRIED = {"function|load", "client|setinfo"}


class OurServer(RedisServer):
    """With the files of deploy/redis, changed only where an operator must change them. Passwords are users' names."""

    def start(self, users: tuple[str, ...] = USERS) -> None:
        """With a password for each of these users."""
        acl = (DEPLOY / "users.acl").read_text()
        for user in users:
            acl = acl.replace(f"SHA256_OF_THE_PASSWORD_OF_{user.upper()}", sha256(user.encode()).hexdigest())
        (self.folder / "users.acl").write_text(acl)
        conf = (DEPLOY / "redis.conf").read_text().replace("/etc/redis", str(self.folder))
        (self.folder / "redis.conf").write_text(conf.replace("/var/lib/redis", str(self.folder)))
        command = ["redis-server", str(self.folder / "redis.conf"), "--port", str(self.port), "--logfile", "redis.log"]
        self._process = subprocess.Popen(command)
        until_s = time.monotonic() + START_S
        while True:
            try:
                return check(self.url_of("admin"))
            except StartupError as error:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    self.kill9()
                    raise RuntimeError((self.folder / "redis.log").read_text()[-2000:]) from error
                time.sleep(0.005)

    def user(self, name: str) -> redis.Redis:
        """A client, to be closed."""
        return redis.Redis.from_url(self.url_of(name), protocol=2)

    def url_of(self, name: str) -> str:
        return self.url.replace("//", f"//{name}:{name}@")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OurServer]:
    need_redis()
    started = OurServer(tmp_path)
    with started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OurServer]:
    """For tests that change nothing. Its functions are loaded."""
    need_redis()
    started = OurServer(tmp_path_factory.mktemp("redis"))
    with started:
        check(started.url_of("admin"), load=True)
        yield started


@asynccontextmanager
async def programs(server: OurServer) -> AsyncIterator[tuple[RedisRequests, RedisWork]]:
    """An api and a worker, each as its user."""
    links = [Link(server.url_of("api")), Link(server.url_of("worker"), may_load=True)]
    for link in links:
        await link.open()
    requests, worker = RedisRequests(links[0], lambda: INFO.queue, 9, 999), RedisWork(links[1], "w1", INFO)
    await requests.open()
    await worker.open()
    yield requests, worker
    await worker.close()
    await requests.close()
    for link in links:
        await link.close()


# --- what they need --------------------------------------------------------------------------------------------------


async def test_a_request_goes_its_whole_way(server: OurServer) -> None:
    check(server.url_of("admin"), load=True)
    async with programs(server) as (requests, worker):
        assert await requests.workers() == [INFO]
        for id in ("a", "b", "c"):
            await requests.submit([ask(id, orphan_s=30.0)])
        assert (await requests.load()).num_waiting == len(await worker.claim(9)) == 3
        async with reading(requests, "a") as reader:
            await worker.commit([Delta("a", 0, (7, 8))])
            assert await reader.got(2) == [7, 8]
            await requests.cancel("b", "default")
            assert (await verdicts(worker, "b"))["b"] == Verdict.CANCELLED
            await worker.release(["c"])
            assert [job.request.id for job in await worker.claim(9)] == ["c"]
            await worker.abandon(["c"])
            await worker.commit([Delta("a", 2, (9,), finish=STOP)])
            assert token_ids(await reader.log()) == [7, 8, 9]
        assert reason(await read(requests, "b")) == FinishReason.CANCELLED
        assert [request.id for request in await requests.lookup("c", "default")] == ["c"]
    refused_nothing(server)


@pytest.mark.parametrize("lost", [["o:a"], ["o:a", "r:a"]], ids=["healed", "restored"])
async def test_an_api_gives_back_what_redis_lost(server: OurServer, lost: list[str]) -> None:
    check(server.url_of("admin"), load=True)
    async with programs(server) as (requests, worker):
        await requests.submit([ask("a")])
        await worker.claim(1)
        async with reading(requests, "a") as reader:
            await worker.commit([Delta("a", 0, (7, 8))])
            await reader.got(2)
            with server.user("api") as cli:
                cli.delete(*[PREFIX + name for name in lost])
                if len(lost) == 1:
                    cli.hset(PREFIX + "r:a", "n", 0)
            assert (await verdicts(worker, "a"))["a"] == Verdict.FENCED  # as its heartbeat finds out
            (job,) = await asyncio.wait_for(worker.claim(1), HANG_S)
            await worker.commit([Delta("a", len(job.so_far), (9,), finish=STOP)])
            assert token_ids(await reader.log()) == [7, 8, 9]
    refused_nothing(server)


async def test_a_parent_hands_back_what_its_engine_held(server: OurServer) -> None:
    check(server.url_of("admin"), load=True)
    async with programs(server) as (requests, worker):
        await requests.submit([ask("a")])
        await worker.claim(1)
        check(server.url_of("worker"))
        assert await asyncio.to_thread(hand_back, server.url_of("worker"), "w1", True) == 1
    refused_nothing(server)


def refused_nothing(server: OurServer) -> None:
    with server.user("admin") as cli:
        assert {refused["object"] for refused in cli.acl_log()} <= TRIED


def test_the_configuration_keeps_what_is_written(shared: OurServer) -> None:
    with shared.user("admin") as cli:
        info = cli.info()
    assert (info["aof_enabled"], info["maxmemory_policy"], info["maxmemory"] > 0) == (1, "noeviction", True)


def test_the_users_may_call_what_the_library_has_and_uses() -> None:
    """And no more: what it does not use, nobody may."""
    of_user = {line.split()[1]: line for line in (DEPLOY / "users.acl").read_text().splitlines()}
    both = f"{of_user['api']} {of_user['worker']}"
    functions = {f"{FUNCTION}{name}" for name in re.findall(r"^register\('(\w+)'", source(), re.MULTILINE)}
    assert set(re.findall(r"\+fcall\|(\w+)", both)) == functions
    used = {name.lower() for name in re.findall(r"call\('([A-Z]+)'", source())}
    assert set(re.findall(r"\+([a-z]+)(?=[ )])", both)) == used | {"ping", "info", "subscribe"}


# --- what they may not -----------------------------------------------------------------------------------------------

FOREIGN = ["GET other", "SET other 1", "HGETALL other", "DEL other", "HSET other a b", "XADD other * a b"]
POWERFUL = ["KEYS *", "FLUSHALL", "FLUSHDB", "CONFIG SET maxmemory 1", "CONFIG GET *", "EVAL x 0", "EVALSHA x 0"]
POWERFUL += ["SCRIPT LOAD x", "DEBUG JMAP", "FUNCTION DELETE x", "FUNCTION FLUSH", "FUNCTION RESTORE x", "SHUTDOWN"]
POWERFUL += ["ACL SETUSER x", "ACL LIST", "MONITOR", "CLIENT KILL ID 1", "REPLICAOF NO ONE", "MODULE LIST", "SAVE"]
POWERFUL += ["RENAME millrace:{0}:due x", "SET millrace:{0}:x 1", "PUBLISH other x", "SUBSCRIBE other", "PSUBSCRIBE *"]
OF_PROGRAMS = ["FUNCTION LOAD x", "FUNCTION LIST", "SCAN 0", "ACL LOG", "CLIENT LIST", "SLOWLOG GET"]
DENIED = {
    "admin": [
        "HSET millrace:{0}:r:a p x",
        "DEL millrace:{0}:r:a",
        f"FCALL {FUNCTION}reap 1 millrace:{{0}}:clock",
        "SUBSCRIBE millrace:{0}:mail:x",
    ],
    "api": [
        *OF_PROGRAMS,
        f"FCALL {FUNCTION}commit 1 millrace:{{0}}:clock",
        f"FCALL {FUNCTION}lose 1 millrace:{{0}}:clock w1",
        f"FCALL {FUNCTION}reap 1 other",
        "SUBSCRIBE millrace:{0}:work:x",
    ],
    "worker": [
        *OF_PROGRAMS,
        f"FCALL {FUNCTION}submit 1 millrace:{{0}}:clock",
        f"FCALL {FUNCTION}restore 1 millrace:{{0}}:clock",
        "SUBSCRIBE millrace:{0}:mail:x",
    ],
}


@pytest.mark.parametrize("user", USERS)
def test_nothing_else_is_allowed(shared: OurServer, user: str) -> None:
    with shared.user(user) as cli:
        for command in (*FOREIGN, *POWERFUL, *DENIED[user]):
            with pytest.raises(redis.ResponseError, match=r"no permission|command not allowed"):
                told = cli.execute_command(*command.split())
                pytest.fail(f"{user} may {command}: {told}")


async def test_who_has_no_name_is_refused_in_one_line(shared: OurServer) -> None:
    for url in (shared.url, shared.url.replace("//", "//api:wrong@")):
        link = Link(url)
        with pytest.raises(StartupError, match="refuses the password; give user and password"):
            await link.open()
        await link.close()


def test_a_forgotten_password_is_noticed(tmp_path: Path) -> None:
    need_redis()
    server = OurServer(tmp_path)
    with pytest.raises(RuntimeError, match="ACL errors"):
        server.start(users=("admin", "api"))


# --- who brings the functions ----------------------------------------------------------------------------------------


async def test_without_functions_a_worker_says_who_can_load_them(
    server: OurServer, capsys: pytest.CaptureFixture[str]
) -> None:
    link = Link(server.url_of("worker"), may_load=True)
    with pytest.raises(
        StartupError, match=r"may not load; who may, runs: millrace load-functions --redis-url redis://"
    ):
        await link.open()
    await asyncio.to_thread(main, ["load-functions", "--redis-url", server.url_of("admin")])
    assert capsys.readouterr().out == f"loaded into {server.url}\n"
    await link.open()
    await link.call("reap", within_s=HANG_S)
    await link.close()


async def test_functions_of_another_version_are_none(server: OurServer) -> None:
    with server.user("admin") as cli:
        cli.function_load(source().replace(f"millrace{PROTOCOL}", f"millrace{PROTOCOL + 1}"))
    link = Link(server.url_of("worker"), may_load=True)
    with pytest.raises(StartupError, match="lacks this version's functions"):
        await link.open()
    await link.close()


async def test_an_api_waits_for_them(server: OurServer) -> None:
    """It starts in any order with the rest, and says no until then."""
    link = Link(server.url_of("api"))
    await link.open()
    with pytest.raises(Unavailable):
        await link.call("reap", within_s=0.1)
    check(server.url_of("admin"), load=True)
    await link.call("reap", within_s=HANG_S)
    await link.close()


@pytest.mark.parametrize("user", ["api", "worker"])
def test_who_may_not_load_is_told_so(shared: OurServer, user: str) -> None:
    with pytest.raises(StartupError, match=r"does not allow this user what it needs: .*function\|load"):
        check(shared.url_of(user), load=True)
