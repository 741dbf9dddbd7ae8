"""`millrace api`, `millrace worker` and `serve --redis-url` as an operator runs them: real processes, a real Redis.

What survives which fault under load is for `tests/faults`; here each program is started, looked at, hurt once, ended.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.client import Reading, ask, replay, resilient, until
from tests.faults.conftest import MISSING, REQUIRED, STORYTELLER
from tests.faults.history import Unfailed, asked, assert_exact
from tests.faults.procs import ROOT, Api, Cluster, Worker, wait
from tests.faults.redis_server import RedisServer, free_port
from tests.model.conftest import random_decoder, save_folder

pytestmark = pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=str(MISSING))

# A process in which any import of torch fails.
TORCHLESS = "import sys; sys.modules['torch'] = None; from service.cli import main; main()"
# An engine process whose engine hangs after fifty steps, deep in a call that never returns.
HANGING = """
import itertools, threading
from model.engine.engine import Engine
steps, step = itertools.count(), Engine.step
Engine.step = lambda self: step(self) if next(steps) < 50 else threading.Event().wait()
from service.cli import main
main()
"""
LONG = asked("Once upon a time", seed=5, max_tokens=300)
ENGINE_UP_S = 60.0  # a hang guard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(random_decoder(STORYTELLER), tmp_path_factory.mktemp("model") / "storyteller")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Unfailed:
    return Unfailed(folder)


@pytest.fixture
def cluster(folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    with RedisServer(tmp_path / "redis") as redis, Cluster(redis, folder, tmp_path) as cluster:
        yield cluster


def torchless_api(cluster: Cluster, model: Path | None = None, *flags: str) -> Api:
    """An api that could not import torch if it tried."""
    command = [sys.executable, "-c", TORCHLESS, "api", "--redis-url", cluster.redis.url]
    command += ["--model", str(model or cluster.model), *flags]
    name = f"torchless-{len(cluster.apis)}"
    cluster.apis.append(Api(name, command, cluster.folder / f"{name}.log", free_port()))
    return cluster.apis[-1]


def detail(api: Api, path: str = "/ready") -> str:
    """What a GET answers, in words."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{api.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return str(json.loads(error.read())["detail"])
    except OSError:
        return ""


@asynccontextmanager
async def streaming(cluster: Cluster, body: dict[str, Any]) -> AsyncIterator[Reading]:
    """A stream that has had twenty tokens, from the first api that runs; should that end, from the next. On the way out
    it is read to its end, if there is an api to read it from."""
    reading = Reading(body)
    reader = asyncio.create_task(resilient(lambda: cluster.ports()[:1], body, reading=reading))
    await until(lambda: reading.num_tokens >= 20, "twenty tokens", ENGINE_UP_S)
    assert reading.terminal is None, "too fast to be broken"
    yield reading
    if cluster.ports():
        await asyncio.wait_for(reader, 60)
    reader.cancel()


def num_held(cluster: Cluster, worker: Worker) -> int:
    """Requests that the worker's engine is computing."""
    name = re.findall(r"^worker  (\S+)", worker.said(), re.MULTILINE)[-1]
    return int(cluster.redis.cli().scard(f"millrace:{{0}}:held:{name}"))


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def comparable(event: bytes) -> dict[str, Any]:
    """A data event without what differs from run to run."""
    told: dict[str, Any] = json.loads(event)
    return {key: value for key, value in told.items() if key not in ("id", "created", "timings")}


# --- readiness -------------------------------------------------------------------------------------------------------


def test_an_api_without_torch_is_ready_when_a_worker_of_its_model_lives_and_not_after(cluster: Cluster) -> None:
    api = torchless_api(cluster)
    wait(lambda: "no worker is alive" in detail(api), "it is up", ENGINE_UP_S)
    worker = cluster.worker()
    wait(api.ready, "a worker", ENGINE_UP_S)
    assert json.loads(detail(api)) == {"status": "ready", "workers": 1}
    worker.term()
    assert worker.exit_code() == 0
    wait(lambda: "no worker is alive" in detail(api), "the worker is gone")
    assert api.status("/metrics") == api.status("/health") == 200


def test_a_worker_of_another_model_is_named_as_what_it_is_and_its_api_needs_no_weights(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = save_folder(random_decoder(replace(STORYTELLER, num_layers=1)), tmp_path / "other")
    retrained = save_folder(random_decoder(STORYTELLER, seed=1), tmp_path / "retrained")
    cluster.worker("--max-model-len", "100")
    misfits = [torchless_api(cluster, model) for model in (other, retrained)]
    misfits.append(torchless_api(cluster, None, "--dtype", "bfloat16"))
    for api, told in zip(misfits, ("config or tokenizer", "weights differ", "float32, not bfloat16"), strict=True):
        wait(lambda api=api, told=told: told in detail(api), told, ENGINE_UP_S)  # type: ignore[misc]
    (retrained / "model.safetensors").unlink()
    bare = torchless_api(cluster, retrained)
    wait(bare.ready, "any weights do", ENGINE_UP_S)
    assert '"max_model_len":100' in detail(bare, "/v1/models")


async def test_redis_away_is_told_and_new_requests_are_refused_within_a_second(cluster: Cluster) -> None:
    api, _ = cluster.api(), cluster.worker()
    cluster.until_ready()
    cluster.redis.stop()
    wait(lambda: "Redis has not answered" in detail(api), "it is told")
    began_s = time.monotonic()
    part = await ask(api.port, "POST", "/generate", asked("a", 1, 1))
    assert (part.status, time.monotonic() - began_s < 1) == (503, True)
    assert part.head is not None
    assert "retry-after" in part.head.headers
    cluster.redis.cont()
    wait(api.ready, "Redis answers again")


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_over_redis_has_the_bytes_of_the_embedded_one(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(folder)]
    cluster.apis.append(embedded := Api("embedded", command, tmp_path / "embedded.log", free_port()))
    cluster.worker()
    over_redis = torchless_api(cluster)
    cluster.until_ready()
    body = asked("Once upon a time", seed=9, max_tokens=40, logprobs=2, stop=["zzz"])
    one, two = [await resilient(lambda port=api.port: [port], body) for api in (embedded, over_redis)]  # type: ignore[misc]
    assert [comparable(e.data) for e in one.events] == [comparable(e.data) for e in two.events]
    assert [e.id.partition(":")[2] for e in one.events] == [e.id.partition(":")[2] for e in two.events]
    whole = await ask(over_redis.port, "POST", "/generate", body)
    assert json.loads(whole.body)["choices"][0]["token_ids"] == one.token_ids[0]


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_a_stream_survives_its_engine(cluster: Cluster, oracle: Unfailed, num_workers: int) -> None:
    cluster.api()
    workers = [cluster.worker() for _ in range(num_workers)]
    cluster.until_ready()
    async with streaming(cluster, LONG) as reading:
        (busy,) = [worker for worker in workers if num_held(cluster, worker)]
        busy.kill_engine()
        await until(lambda: "ended with -9; its 1 requests are back in the queue" in busy.said(), "handed back")
    assert_exact([reading], oracle)
    assert len(reading.parts) == 1


async def test_an_engine_dies_with_its_keeper_and_its_stream_goes_on_elsewhere(
    cluster: Cluster, oracle: Unfailed
) -> None:
    _, first = cluster.api(), cluster.worker()
    cluster.until_ready()
    async with streaming(cluster, LONG) as reading:
        engine = first.engine()
        first.kill9()
        began_s = time.monotonic()
        await until(lambda: is_gone(engine), "the engine is gone")
        assert time.monotonic() - began_s < 2
        cluster.worker()
    assert_exact([reading], oracle)


@contextmanager
def hanging(cluster: Cluster, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """An announced engine process that will hang in its middle, without a keeper."""
    settings = {"REDIS_URL": cluster.redis.url, "MODEL": str(cluster.model), "STUCK_S": "1", "LEASE_S": "1"}
    environment = os.environ | {f"MILLRACE_{name}": value for name, value in settings.items()}
    words = [sys.executable, "-c", HANGING, "engine", "--name", "x", "--keeper", str(os.getpid()), "--up", "1"]
    with (
        log.open("w+b") as out,
        subprocess.Popen(words, stdout=out, stderr=out, cwd=ROOT, env=environment) as engine,
    ):
        try:
            wait(lambda: cluster.num_announced() == 1, "up", ENGINE_UP_S)
            yield engine
        finally:
            engine.kill()


async def test_an_engine_that_hangs_ends_itself_and_its_stream_goes_on_elsewhere(
    cluster: Cluster, oracle: Unfailed, tmp_path: Path
) -> None:
    cluster.api()
    with hanging(cluster, tmp_path / "hanging.log") as engine:
        async with streaming(cluster, LONG) as reading:
            assert await asyncio.to_thread(engine.wait, 30) == 1
            cluster.worker()
    assert_exact([reading], oracle)
    assert "has made no progress" in (tmp_path / "hanging.log").read_text()


async def test_a_request_waits_in_redis_for_the_next_worker(cluster: Cluster, oracle: Unfailed) -> None:
    api, first = cluster.api(), cluster.worker()
    cluster.until_ready()
    first.term()
    assert first.exit_code() == 0
    body = asked("Once", seed=2, max_tokens=20)
    accepted = await ask(api.port, "POST", "/generate", {**body, "background": True})
    assert accepted.status == 202
    wait(lambda: not api.ready(), "it is told that nobody computes")
    cluster.worker()
    reading = await replay(api.port, json.loads(accepted.body)["id"])
    reading.body = body
    assert_exact([reading], oracle)


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain_s", ["30", "0"])
async def test_a_worker_told_to_stop_finishes_or_hands_over_and_exits_with_0(
    cluster: Cluster, oracle: Unfailed, drain_s: str
) -> None:
    _, first = cluster.api(), cluster.worker("--drain-s", drain_s)
    cluster.until_ready()
    async with streaming(cluster, LONG) as reading:
        first.term()
        if drain_s == "0":
            cluster.worker()
        assert await asyncio.to_thread(first.exit_code) == 0
        assert (reading.terminal is None) == (drain_s == "0")
    assert_exact([reading], oracle)
    assert "requests are back" not in first.said()


async def test_an_api_told_to_stop_lets_its_streams_end(cluster: Cluster, oracle: Unfailed) -> None:
    api = cluster.api("--drain-s", "30")
    cluster.worker()
    cluster.until_ready()
    async with streaming(cluster, LONG) as reading:
        api.term()
        assert await asyncio.to_thread(api.exit_code) == 0
        await until(lambda: reading.done, "the end")
    assert_exact([reading], oracle)
    assert len(reading.parts) == 1


async def test_what_an_api_has_no_time_for_is_read_on_elsewhere(cluster: Cluster, oracle: Unfailed) -> None:
    hasty, _ = cluster.api("--drain-s", "0.1"), cluster.api()
    cluster.worker()
    cluster.until_ready()
    async with streaming(cluster, LONG) as reading:
        hasty.term()
        assert await asyncio.to_thread(hasty.exit_code) == 0
    assert_exact([reading], oracle)
    assert len(reading.parts) > 1
    assert reading.parts[0].broken is None, "cut off instead of ended"


async def test_a_second_signal_waits_for_no_stream(cluster: Cluster) -> None:
    api = cluster.api("--drain-s", "60")
    cluster.worker()
    cluster.until_ready()
    async with streaming(cluster, asked("a", seed=1, max_tokens=900)) as reading:
        api.term()
        await until(lambda: "draining" in api.said(), "the first signal was heard")
        api.popen.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(api.exit_code, 10) == 0
        assert reading.terminal is None


# --- both in one command ---------------------------------------------------------------------------------------------


def serve(cluster: Cluster, *flags: str) -> Api:
    command = [sys.executable, "-c", TORCHLESS, "serve", "--redis-url", cluster.redis.url]
    command += ["--model", str(cluster.model), *flags]
    cluster.apis.append(Api("serve", command, cluster.folder / "serve.log", free_port()))
    return cluster.apis[-1]


async def test_serve_with_a_redis_runs_both_and_ends_both_in_order(cluster: Cluster, oracle: Unfailed) -> None:
    both = serve(cluster)
    wait(lambda: "try: curl" in both.said(), "the last line of the start", ENGINE_UP_S)
    assert both.ready()
    assert re.findall(r"^(\w+)  ", both.said(), re.MULTILINE) == ["model", "device", "cache", "worker", "api", "url"]
    below = both.children()
    async with streaming(cluster, LONG) as reading:
        both.term()
        assert await asyncio.to_thread(both.exit_code) == 0
    assert_exact([reading], oracle)
    assert len(below) == 2
    assert all(map(is_gone, below))


def test_a_worker_that_dies_by_itself_ends_serve_with_1(cluster: Cluster) -> None:
    both = serve(cluster)
    wait(both.ready, "up", ENGINE_UP_S)
    keeper = next(child for child in both.children() if "worker" in child.cmdline())
    keeper.kill()
    assert both.exit_code() == 1
    assert "the worker ended by itself" in both.said()
    wait(lambda: cluster.num_announced() == 0 or not both.children(), "nobody is left")


def test_a_killed_serve_takes_its_worker_with_it(cluster: Cluster) -> None:
    both = serve(cluster)
    wait(both.ready, "up", ENGINE_UP_S)
    below = both.children()
    both.kill9()
    wait(lambda: all(map(is_gone, below)), "all gone")


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    """The one line that a start was refused with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    command = [sys.executable, "-m", "service.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (3, "", 1), ended
    return ended.stderr


@pytest.mark.parametrize("words", [["api", "--port", "0"], ["worker"], ["serve", "--port", "0"]])
def test_a_redis_that_can_not_be_used_is_refused_in_one_line(words: list[str], folder: Path, tmp_path: Path) -> None:
    words = [*words, "--model", str(folder), "--redis-url"]
    assert "redis-server" in refusal(*words, f"redis://127.0.0.1:{free_port()}")
    with RedisServer(tmp_path / "locked", password="s3cret") as locked:
        told = refusal(*words, f"redis://:wr0ng@127.0.0.1:{locked.port}")
        assert "password" in told
        assert "wr0ng" not in told
        locked.cli().config_set("maxmemory-policy", "allkeys-lru")
        assert "maxmemory-policy noeviction" in refusal(*words, locked.url)


@pytest.mark.parametrize("word", ["api", "worker"])
def test_without_a_redis_neither_half_starts(word: str) -> None:
    assert "--redis-url" in refusal(word)


def test_a_model_that_can_not_be_served_is_refused_in_one_line(cluster: Cluster) -> None:
    flags = ["--redis-url", cluster.redis.url]
    assert "no/such/folder" in refusal("api", *flags, "--model", "no/such/folder", "--port", "0")
    assert "--cache-gib" in refusal("worker", *flags, "--model", str(cluster.model), "--cache-gib", "0.00001")
    assert "--cache-gib" in refusal(
        "serve", *flags, "--model", str(cluster.model), "--cache-gib", "0.00001", "--port", "0"
    )


def test_the_password_is_in_no_line_and_in_no_command(folder: Path, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "locked", password="s3cret") as locked, (tmp_path / "log").open("w+b") as log:
        environment = {**os.environ, "MILLRACE_REDIS_URL": locked.url, "MILLRACE_LOG_LEVEL": "debug"}
        command = [sys.executable, "-m", "service.cli", "serve", "--model", str(folder), "--port", "0"]
        with subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment) as process:
            try:
                wait(lambda: b"try: curl" in (tmp_path / "log").read_bytes(), "up", ENGINE_UP_S)
                below = psutil.Process(process.pid).children(recursive=True)
                assert len(below) == 2
                assert not any("s3cret" in word for child in below for word in child.cmdline())
            finally:
                process.terminate()
        assert b"s3cret" not in (tmp_path / "log").read_bytes()
