"""The stack that a load test starts: `millrace serve`, or Redis with an api and workers, on free ports of this machine.

It sends nothing but the question whether the server is ready.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.client import wait_until_ready
from tests.faults.redis_server import RedisServer, free_port

READY_S = 120.0


@dataclass(frozen=True, slots=True)
class Stack:
    """Where it is asked, where its processes tell their metrics, and which those are, if it was started here."""

    url: str
    metrics_urls: tuple[str, ...]
    described: str
    pids: tuple[int, ...]


@contextmanager
def started(out: Path, flags: Sequence[str], num_workers: int) -> Iterator[Stack]:
    """A server with these flags; with workers, as many behind a Redis, else embedded. Logs go to `out`. Raises
    `RuntimeError` where it does not become ready."""
    with ExitStack() as stack:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        if not num_workers:
            pid = _run(stack, out / "serve.log", ["serve", "--port", str(port), *flags])
            wait_until_ready(port, READY_S)
            yield Stack(url, (url,), " ".join(["millrace serve", *flags]), (pid,))
            return
        redis = stack.enter_context(RedisServer(out / "redis"))
        ports, pids = [free_port() for _ in range(num_workers)], [redis.pid]
        for at in ports:
            own = ["worker", "--redis-url", redis.url, "--metrics-port", str(at), *flags]
            pids.append(_run(stack, out / f"worker-{at}.log", own))
        model = [flag for i, flag in enumerate(flags) if "--model" in flags[max(0, i - 1) : i + 1]]
        pids.append(_run(stack, out / "api.log", ["api", "--redis-url", redis.url, "--port", str(port), *model]))
        wait_until_ready(port, READY_S)
        metrics = (url, *(f"http://127.0.0.1:{at}" for at in ports))
        described = f"millrace api, {num_workers} x millrace worker {' '.join(flags)}, redis-server"
        yield Stack(url, metrics, described, tuple(pids))


def _run(stack: ExitStack, log: Path, arguments: Sequence[str]) -> int:
    """One process of ours, which ends with the stack: asked first, then killed. Returns its id."""
    out = stack.enter_context(log.open("wb"))
    process = subprocess.Popen([sys.executable, "-m", "service.cli", *arguments], stdout=out, stderr=out)

    def end() -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process.pid
