"""Real processes of the product: starting them, looking at them, and every way of hurting them.

A `Cluster` is one Redis, any number of `millrace api` and `millrace worker`, each with its own log file. It waits for
conditions, never for a time; how a process is told to fail from within is `toy.py`'s business.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import psutil

from service.broker.redis import hand_back
from tests.faults import toy
from tests.faults.redis_server import RedisServer, free_port

FORKS = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).parent.parent.parent
START_S = 60.0  # a hang guard
GUARD_S = 60.0


def wait(holds: Callable[[], bool], what: str, guard_s: float = GUARD_S) -> float:
    """Wait for a condition and return the seconds it took. Raises `AssertionError` after the hang guard."""
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < guard_s, f"not within {guard_s:.0f} s: {what}"
        time.sleep(0.03)
    return time.monotonic() - began_s


class Process:
    """One process of ours with its children. `log` is the file that gets everything it says."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with log.open("ab") as out:
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def alive(self) -> bool:
        """Whether it runs; a frozen one does."""
        return self.popen.poll() is None

    def children(self) -> list[psutil.Process]:
        """Every process below it, alive."""
        with suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(self.pid).children(recursive=True) if runs(child)]
        return []

    def kill9(self) -> None:
        """This process alone; what its children do then is theirs."""
        self.popen.kill()
        self.popen.wait()

    def term(self) -> None:
        """Ask it to end."""
        self.popen.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP to the process and its children."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT to all of them."""
        self._signal_all(signal.SIGCONT)

    def exit_code(self, guard_s: float = GUARD_S) -> int:
        """Wait for its end. Raises `subprocess.TimeoutExpired`."""
        return self.popen.wait(guard_s)

    def clear(self) -> None:
        """End it and everything below it, whatever state they are in."""
        below = self.children()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.kill9()
        psutil.wait_procs(below, timeout=GUARD_S)

    def num_connections(self, ports: set[int]) -> int:
        """Its open TCP connections to these ports, its children's included."""
        found = 0
        for process in [psutil.Process(self.pid), *self.children()]:
            with suppress(psutil.NoSuchProcess):
                found += sum(bool(c.raddr) and c.raddr.port in ports for c in process.net_connections("tcp"))
        return found

    def num_fds(self) -> int:
        """Open descriptors of the process itself."""
        num: int = psutil.Process(self.pid).num_fds()
        return num

    def cpu_s(self) -> float:
        """Processor seconds so far, children included."""
        total = 0.0
        for process in [psutil.Process(self.pid), *self.children()]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def _signal_all(self, number: signal.Signals) -> None:
        for process in [psutil.Process(self.pid), *self.children()] if self.alive() else []:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class Api(Process):
    """`millrace api` on a port of its own."""

    def __init__(self, name: str, command: Sequence[str], log: Path, port: int) -> None:
        self.port = port
        super().__init__(name, [*command, "--port", str(port)], log)

    def status(self, path: str = "/ready", within_s: float = 5.0) -> int:
        """What a GET answers; 0 if nothing does."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=within_s) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    def ready(self) -> bool:
        """Whether it would take a request now."""
        return self.status() == 200

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().split("\n")
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


class Worker(Process):
    """`millrace worker`: the process itself is the keeper, its child the engine."""

    def engine(self) -> psutil.Process:
        """The engine process. Raises `AssertionError` if there is none now."""
        found = self.children()
        assert found, f"{self.name} has no engine:\n{self.said()[-2000:]}"
        return found[0]

    def kill_engine(self) -> None:
        """kill -9 of the engine; its keeper goes on."""
        self.engine().kill()

    def kill_both(self) -> None:
        """kill -9 of keeper and engine at once."""
        self.clear()


class Toy(Process):
    """A `toy.py` worker. Forked from a process that has imported torch already, since tests start many of them."""

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        self._url = argv[argv.index("--redis-url") + 1]
        FORKS.set_forkserver_preload(["tests.faults.toy"])
        self._process = FORKS.Process(target=toy.forked, args=(argv, str(log)), name=name, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill9(self) -> None:
        self._process.kill()
        self._process.join()

    def term(self) -> None:
        self._process.terminate()

    def hand_back(self) -> None:
        """Once it is dead: what its keeper would do if it had one, and if it had failed by itself."""
        hand_back(self._url, self.said().partition("working as ")[2].split()[0], failed=True)

    def exit_code(self, guard_s: float = GUARD_S) -> int:
        self._process.join(guard_s)
        assert self._process.exitcode is not None, f"{self.name} has not ended within {guard_s:.0f} s"
        return self._process.exitcode


class Cluster:
    """Everything of one test. At the end all of it is killed, and after a failure the ends of the logs are printed."""

    def __init__(self, redis: RedisServer, model: Path, folder: Path, *, lease_s: float = 1.0) -> None:
        self.redis, self.model, self.folder, self.lease_s = redis, model, folder, lease_s
        self.apis: list[Api] = []
        self.workers: list[Worker] = []
        self.toys: list[Toy] = []
        self.redis_ports = {redis.port}  # by which it is reached
        self._num_started = 0

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self.apis, *self.workers, *self.toys):
            process.clear()
        if error is not None:
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")

    def api(self, *flags: str, redis_url: str = "") -> Api:
        """Start one; it may not be ready yet."""
        name = self._name("api")
        command = [*self._command("api", redis_url), "--host", "127.0.0.1", *flags]
        self.apis.append(api := Api(name, command, self.folder / f"{name}.log", free_port()))
        return api

    def worker(self, *flags: str, redis_url: str = "") -> Worker:
        """Start one; it may not have announced itself yet."""
        name = self._name("worker")
        command = [*self._command("worker", redis_url), "--device", "cpu", "--dtype", "float32", "--threads", "1"]
        command += [
            "--no-native",
            "--lease-s",
            str(self.lease_s),
            *flags,
        ]  # slow, so that there is time to break things
        self.workers.append(worker := Worker(name, command, self.folder / f"{name}.log"))
        return worker

    def toy(self, *flags: str, redis_url: str = "") -> Toy:
        """Start a `toy.py` worker."""
        name = self._name("toy")
        argv = [*self._where(redis_url), "--lease-s", str(self.lease_s), *flags]
        self.toys.append(process := Toy(name, argv, self.folder / f"{name}.log"))
        return process

    def ports(self) -> list[int]:
        """Of the apis that run."""
        return [api.port for api in self.apis if api.alive()]

    def until_ready(self, num_workers: int = -1) -> None:
        """Until every running api is ready and so many workers (all that were started) are announced."""
        expected = len(self.running_workers()) if num_workers < 0 else num_workers
        wait(lambda: self.num_announced() == expected, f"{expected} announced workers", START_S)
        for api in self.apis:
            if api.alive():
                wait(api.ready, f"{api.name} is ready", START_S)

    def running_workers(self) -> list[Process]:
        """Workers and toys that run."""
        return [process for process in (*self.workers, *self.toys) if process.alive()]

    def num_announced(self) -> int:
        """Workers with a lease."""
        return int(self.redis.cli().zcard("millrace:{0}:workers"))

    def _command(self, word: str, redis_url: str) -> list[str]:
        return [sys.executable, "-m", "service.cli", word, *self._where(redis_url)]

    def _where(self, redis_url: str) -> list[str]:
        url = redis_url or self.redis.url
        self.redis_ports.add(urlsplit(url).port or 0)
        return ["--redis-url", url, "--model", str(self.model)]

    def _name(self, kind: str) -> str:
        self._num_started += 1
        return f"{self._num_started:02d}-{kind}"


def runs(process: psutil.Process) -> bool:
    """Whether it is alive, and not only waited for."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
