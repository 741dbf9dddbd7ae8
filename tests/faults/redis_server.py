"""A real redis-server for a test: a free loopback port, a folder of its own, and the ways in which it can fail.

It knows nothing of what is stored. Killed with SIGKILL whatever happens, so that no test leaves one behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
START_S = 20.0  # a hang guard, not a wait


def missing() -> str | None:
    """Why there is no redis-server to test with, or None."""
    path = shutil.which("redis-server")
    if path is None:
        return "redis-server is not on PATH; deploy/redis.sh installs it"
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = told.partition("v=")[2].split()[0]
    return None if int(version.split(".")[0]) >= 7 else f"redis-server {version} is older than 7"


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class RedisServer:
    """`with RedisServer(folder) as server`. Options are redis.conf's; without `appendonly` a kill loses everything.

    With `clock` its wall clock can be moved by `set_clock`, which needs libfaketime; its monotonic clock stays true.
    """

    def __init__(self, folder: Path, *, appendonly: bool = False, password: str = "", clock: bool = False) -> None:
        self.folder, self.appendonly, self.password = folder, appendonly, password
        self.port = free_port()
        self._clock = folder / "clock" if clock else None
        self._process: subprocess.Popen[bytes] | None = None
        self._cli: redis.Redis | None = None

    @property
    def url(self) -> str:
        """As `--redis-url` takes it."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> "RedisServer":
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._clock is not None:
            self.set_clock(0)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill9()

    def start(self) -> None:
        """On the same port and folder as before. Raises `RuntimeError` with the log's end if it does not answer."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes" if self.appendonly else "no", "--logfile", "redis.log"]
        command += ["--enable-debug-command", "local", "--maxmemory-policy", "noeviction"]
        if self.password:
            command += ["--requirepass", self.password]
        self._process = subprocess.Popen(command, env=self._environment())
        until_s = time.monotonic() + START_S
        while True:
            try:
                self.cli().ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError) as error:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    self.kill9()
                    raise RuntimeError((self.folder / "redis.log").read_text()[-2000:]) from error
                time.sleep(0.005)

    def kill9(self) -> None:
        """Dead at once, with whatever it had not written."""
        if self._cli is not None:
            self._cli.close()
            self._cli = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, *, keep_data: bool = True) -> None:
        """Start again after a kill; without `keep_data` as one that has never seen anything."""
        self.kill9()
        if not keep_data:
            shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        self.start()

    def stop(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """Go on after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def cli(self) -> redis.Redis:
        """A client for looking and for configuring; replies are bytes."""
        if self._cli is None:
            once = Retry(NoBackoff(), 0)
            self._cli = redis.Redis(
                port=self.port, password=self.password or None, socket_timeout=5, retry=once, protocol=2
            )
        return self._cli

    def fill(self, spare_bytes: int = 0) -> None:
        """Make memory run out: from now on a write that needs memory is refused. `spare_bytes` stay free."""
        used = self.cli().info("memory")["used_memory"]
        self.cli().config_set("maxmemory", used + spare_bytes if spare_bytes else 1)

    def empty(self) -> None:
        """Take back `fill`."""
        self.cli().config_set("maxmemory", 0)

    def set_clock(self, offset_s: int) -> None:
        """Move its wall clock so far from the true one."""
        assert self._clock is not None, "made without a clock"
        fresh = self._clock.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}s\n")
        fresh.replace(self._clock)

    def calls(self) -> dict[str, int]:
        """How often each command was called, by name."""
        stats: dict[str, dict[str, int]] = self.cli().info("commandstats")
        return {name.removeprefix("cmdstat_"): int(values["calls"]) for name, values in stats.items()}

    def clients(self) -> Sequence[dict[str, str]]:
        """CLIENT LIST without our own connection."""
        listed: list[dict[str, str]] = self.cli().client_list()
        mine = str(self.cli().client_id())
        return [client for client in listed if client["id"] != mine]

    def _environment(self) -> dict[str, str]:
        if self._clock is None:
            return dict(os.environ)
        assert FAKETIME is not None, "libfaketime is not installed"
        faketime = {
            "LD_PRELOAD": f"{FAKETIME}:libc.so.6",  # with jemalloc's malloc the library would call itself at its start
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        return {**os.environ, **faketime}
