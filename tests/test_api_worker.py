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
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.client import Reading, ask, replay, resilient, until
from tests.faults.conftest import HANG_S, MISSING, REQUIRED, STORYTELLER, House
from tests.faults.history import Unfailed, asked, assert_exact
from tests.faults.procs import ROOT, Api, Cluster, runs, wait
from tests.faults.redis_server import RedisServer, free_port
from tests.model.conftest import random_decoder, save_folder

pytestmark = [
    pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=str(MISSING)),
    pytest.mark.faults,
    pytest.mark.timeout(HANG_S),
]

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


@pytest.fixture(scope="module")
def shared_pair(folder: Path, oracle: Unfailed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(tmp_path_factory.mktemp("pair") / "redis"))
        cluster = stack.enter_context(Cluster(redis, folder, redis.folder.parent))
        yield House(cluster, oracle, num_apis=1, num_workers=1, drain_s=60)


@pytest.fixture
def pair(shared_pair: House) -> Iterator[Cluster]:
    """An api and a worker that several tests share."""
    with shared_pair.lent():
        yield shared_pair.cluster


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


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_over_redis_has_the_bytes_of_the_embedded_one(pair: Cluster) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--no-native", "--model", str(pair.model)]
    embedded = Api("embedded", command, pair.folder / "embedded.log", free_port())
    try:
        wait(embedded.ready, "up", ENGINE_UP_S)
        body, over_redis = asked("Once upon a time", seed=9, max_tokens=40, logprobs=2, stop=["zzz"]), pair.ports()[-1]
        one, two = [await resilient(lambda port=port: [port], body) for port in (embedded.port, over_redis)]  # type: ignore[misc]
    finally:
        embedded.clear()
    assert [comparable(e.data) for e in one.events] == [comparable(e.data) for e in two.events]
    assert [e.id.partition(":")[2] for e in one.events] == [e.id.partition(":")[2] for e in two.events]
    whole = await ask(over_redis, "POST", "/generate", body)
    assert json.loads(whole.body)["choices"][0]["token_ids"] == one.token_ids[0]


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
            wait(lambda: cluster.num_announced() == 2, "up", ENGINE_UP_S)
            yield engine
        finally:
            engine.kill()


async def test_an_engine_that_hangs_ends_itself_and_its_stream_goes_on_elsewhere(
    pair: Cluster, oracle: Unfailed, tmp_path: Path
) -> None:
    worker = pair.workers[-1]
    with hanging(pair, tmp_path / "hanging.log") as engine:
        worker.freeze()
        async with streaming(pair, LONG) as reading:
            assert await asyncio.to_thread(engine.wait, 30) == 1
            worker.thaw()
    assert_exact([reading], oracle)
    assert "has made no progress" in (tmp_path / "hanging.log").read_text()


async def test_a_request_waits_in_redis_for_the_next_worker(pair: Cluster, oracle: Unfailed) -> None:
    api, first = pair.apis[-1], pair.workers[-1]
    first.term()
    assert first.exit_code() == 0
    body = asked("Once", seed=2, max_tokens=20)
    accepted = await ask(api.port, "POST", "/generate", {**body, "background": True})
    assert accepted.status == 202
    wait(lambda: not api.ready(), "it is told that nobody computes")
    pair.worker()
    reading = await replay(api.port, json.loads(accepted.body)["id"])
    reading.body = body
    assert_exact([reading], oracle)


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_a_worker_told_to_stop_lets_its_streams_end(pair: Cluster, oracle: Unfailed) -> None:
    worker = pair.workers[-1]
    async with streaming(pair, LONG) as reading:
        worker.term()
        assert await asyncio.to_thread(worker.exit_code) == 0
        assert reading.terminal is not None
    assert_exact([reading], oracle)
    assert "requests are back" not in worker.said()


async def test_an_api_told_to_stop_lets_its_streams_end(pair: Cluster, oracle: Unfailed) -> None:
    api = pair.apis[-1]
    async with streaming(pair, LONG) as reading:
        api.term()
        assert await asyncio.to_thread(api.exit_code) == 0
        await until(lambda: reading.done, "the end")
    assert_exact([reading], oracle)
    assert len(reading.parts) == 1


async def test_a_second_signal_waits_for_no_stream(pair: Cluster) -> None:
    api = pair.apis[-1]
    async with streaming(pair, asked("a", seed=1, max_tokens=900)) as reading:
        api.term()
        await until(lambda: "draining" in api.said(), "the first signal was heard")
        api.popen.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(api.exit_code, 10) == 0
        assert reading.terminal is None
    another = pair.api()
    wait(another.ready, "up", ENGINE_UP_S)
    assert (await ask(another.port, "DELETE", f"/generate/{reading.id}")).status == 202


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
    assert not any(map(runs, below))


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
    wait(lambda: not any(map(runs, below)), "all gone")


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    """The one line that a start was refused with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    command = [sys.executable, "-m", "service.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False)
    told = [line for line in ended.stderr.splitlines() if " WARNING " not in line]  # of a Redis that is not ready yet
    assert (ended.returncode, ended.stdout, len(told)) == (3, "", 1), ended
    return told[0]


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
