"""The chat page in a real browser while what it reads from dies: connections, an api of two, an embedded server."""

import asyncio
from collections.abc import Iterator
from itertools import cycle, repeat
from pathlib import Path

import httpx
import pytest

from tests.browser.conftest import HERE, Storyteller
from tests.browser.driver import Browser
from tests.browser.stage import Reciter, stage
from tests.browser.test_chat_page import going
from tests.faults.procs import Cluster
from tests.faults.proxy import Proxy
from tests.faults.redis_server import RedisServer
from tests.faults.redis_server import missing as missing_redis

BUNDLED = HERE.parent.parent / "model" / "bundled"


class RoundRobin(Proxy):
    """Each connection goes to the next of the ports, whether anything is there or not."""

    def __init__(self, ports: Iterator[int]) -> None:
        super().__init__(0)
        self.ports = ports

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target_port = next(self.ports)
        super()._take(reader, writer)


@pytest.mark.skipif(missing_redis() is not None, reason=str(missing_redis()))
def test_a_broken_connection_and_a_killed_api_cost_no_token(browser: Browser, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as redis, Cluster(redis, BUNDLED, tmp_path) as cluster:
        first, second = cluster.api(), cluster.api()
        cluster.toy("--engine", "toy", "--step-s", "0.025")
        cluster.until_ready()
        with (proxy := RoundRobin(repeat(first.port))):

            def kill() -> None:
                proxy.ports = cycle([first.port, second.port])
                first.kill9()

            def mend() -> None:
                proxy.ports = repeat(second.port)

            wants = {"reset": proxy.reset, "kill": kill, "mend": mend}
            told = browser.play("reconnect", wants, url=f"http://127.0.0.1:{proxy.port}/")
        body = {**told["body"], "stream": False, "progress": False}
        whole = httpx.post(f"http://127.0.0.1:{second.port}/generate", json=body, timeout=60).json()
    assert told["bodies"] == 1 and len(told["again"]) >= 3
    assert all(position.partition(":")[2] not in ("", "0") for position in told["again"])
    assert told["text"] == whole["choices"][0]["text"]
    assert told["tokens"] == whole["choices"][0]["token_ids"]


def test_when_an_embedded_server_dies_its_words_are_kept(browser: Browser, storyteller: Storyteller) -> None:
    browser.play("death", {"kill": storyteller.kill, "start": storyteller.start}, url=storyteller.url)


def test_an_answer_that_the_server_has_forgotten_stays_here(browser: Browser) -> None:
    with (
        stage(Reciter(text="a long tale " * 60, pace_s=0.02, go=going())) as before,
        stage(Reciter(text="another one", go=going())) as after,
        (proxy := RoundRobin(repeat(before))),
    ):

        def forget() -> None:
            proxy.ports = repeat(after)
            proxy.reset()

        browser.play("forgotten", {"forget": forget}, url=f"http://127.0.0.1:{proxy.port}/")
