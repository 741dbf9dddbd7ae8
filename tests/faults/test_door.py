"""The real nginx with deploy/nginx before two apis: events leave as they come, streams survive the death of
either api, and a client that leaves frees what it had. Without nginx these are skipped, loudly."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.client import ask, connect, leave, until
from tests.faults.conftest import House
from tests.faults.load import Load, bodies, num_running
from tests.faults.procs import GUARD_S, ROOT, wait
from tests.faults.redis_server import free_port

REQUIRED = os.environ.get("REQUIRE_DOOR") == "1"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
DEPLOY = ROOT / "deploy" / "nginx"
pytestmark = pytest.mark.skipif(
    NGINX is None and not REQUIRED, reason="NOT TESTED, for nginx is not on PATH; deploy/checkers.sh installs it"
)


class Door:
    """An nginx on a port of its own, with our configuration but for that port and the addresses of the apis."""

    def __init__(self, house: House, folder: Path) -> None:
        assert NGINX is not None, "REQUIRE_DOOR=1, and nginx is not on PATH"
        self.house, self.port, self._log = house, free_port(), folder / "nginx.log"
        ours = (DEPLOY / "nginx.conf").read_text().replace("listen 8080;", f"listen 127.0.0.1:{self.port};")
        (folder / "nginx.conf").write_text(ours.replace("/tmp/", f"{folder}/"))
        apis = (DEPLOY / "apis.conf").read_text().replace(" resolve ", " ")
        for name, api in zip(("api-1:8000", "api-2:8000"), house.apis, strict=True):
            assert name in apis
            apis = apis.replace(name, f"127.0.0.1:{api.port}")
        (folder / "apis.conf").write_text(apis)
        command = [NGINX, "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        with self._log.open("wb") as log:
            subprocess.run([*command, "-t"], check=True)
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def serves(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def ports(self) -> list[int]:
        """As `Load` wants them."""
        return [self.port]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(GUARD_S)
        print(self._log.read_text(errors="replace")[-3000:])


@pytest.fixture
def door(house: House, tmp_path: Path) -> Iterator[Door]:
    tmp_path.chmod(0o755)  # nginx's own user writes there, where root starts it
    found = Door(house, tmp_path)
    try:
        wait(found.serves, "nginx serves")
        yield found
    finally:
        found.close()


async def test_events_leave_while_the_rest_is_computed(door: Door) -> None:
    async with Load(door.ports, bodies(4, 100)) as load:
        await load.until_tokens(3)
        assert num_running(door.house.redis) == 4, "what was read came before the end was computed"
        await load.all_exact(door.house.oracle)
    head = load.readings[0].parts[0].head
    assert head is not None and head.headers["content-type"].startswith("text/event-stream")
    assert {len(reading.parts) for reading in load.readings} == {1}


async def test_kill9_of_an_api_behind_it_and_all_are_read_to_their_ends(door: Door) -> None:
    victim = door.house.apis[0]
    async with Load(door.ports, bodies(10, 80)) as load:
        await load.until_tokens(8)
        victim.kill9()
        await load.all_exact(door.house.oracle)
    cut = [reading for reading in load.readings if len(reading.parts) > 1]
    assert 0 < len(cut) < 10, "each api had some of them"


async def test_an_api_that_stops_behind_it_costs_no_request(door: Door) -> None:
    victim = door.house.apis[0]
    async with Load(door.ports, bodies(6, 80)) as load:
        await load.until_tokens(10)
        victim.term()
        await until(lambda: victim.status("/health", 0.2) == 0, "its port is closed")
        async with Load(door.ports, bodies(6, 10)) as late:
            await late.all_exact(door.house.oracle)
        await load.all_exact(door.house.oracle)
    assert await asyncio.to_thread(victim.exit_code) == 0, "it ends once its readers have left it"
    assert {len(reading.parts) for reading in late.readings} == {1}


async def test_a_client_that_leaves_it_is_seen_behind_it(door: Door) -> None:
    body = b'{"prompt": "x", "max_tokens": 900, "stream": true, "ignore_eos": true}'
    reader, writer = await connect(door.port, "POST", "/generate", body)
    await reader.readuntil(b"data: ")
    await leave(writer)
    await until(lambda: num_running(door.house.redis) == 0, "it was cancelled")


async def test_metrics_are_not_for_those_before_it(door: Door) -> None:
    assert (await ask(door.port, "GET", "/metrics")).status == 404
    assert (await ask(door.port, "GET", "/health")).status == 200
