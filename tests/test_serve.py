"""`millrace serve` as a user runs it: a real process, a real port, real signals, a small random model."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch

from loadtests.client import Stream, stream
from service.listen import bind
from service.serve import House
from service.settings import Settings
from tests.model.conftest import TINY, random_decoder, save_folder

COMMAND = [sys.executable, "-m", "service.cli"]
ROOT = Path(__file__).parent.parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: its process, port and the lines it began with."""

    process: subprocess.Popen[str]
    port: int
    banner: tuple[str, ...]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(self.url("/metrics")).text.split("\n")
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def start(*flags: str, log: int = subprocess.PIPE) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::ResourceWarning"}
    command = [*COMMAND, "serve", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment)


@contextmanager
def serving(folder: Path, *flags: str, log: int = subprocess.PIPE) -> Iterator[Served]:
    """A server on a free port, killed at the end if it has not stopped by then. `log` is a file descriptor: a pipe that
    nobody reads is full after some hundred requests."""
    process = start("--model", str(folder), "--port", "0", *flags, log=log)
    assert process.stdout is not None
    try:
        banner = tuple(process.stdout.readline().rstrip("\n") for _ in range(4))
        port = re.search(r"http://127\.0\.0\.1:(\d+)", banner[-1])
        assert port, (banner, process.communicate(timeout=10))
        yield Served(process, int(port[1]), banner)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(random_decoder(TINY), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as running:
        yield running


def ask(served: Served, **fields: object) -> httpx.Response:
    return httpx.post(served.url("/generate"), json={"prompt": "Once upon a time", **fields}, timeout=60)


def test_it_begins_with_four_lines_and_a_curl_that_works_when_pasted(served: Served) -> None:
    assert [line.split()[0] for line in served.banner] == ["model", "device", "cache", "url"]
    curl = served.banner[-1].split("try: ")[1]
    answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.endswith("data: [DONE]\n\n")


def test_the_same_seed_gives_the_same_text_streamed_or_whole_alone_or_among_others(served: Served) -> None:
    fields = {"seed": 5, "max_tokens": 30, "temperature": 1.0}
    alone = ask(served, **fields).json()["choices"][0]

    async def crowd() -> list[Stream]:
        bodies = [{"prompt": "x" * i, "max_tokens": 40, "seed": i} for i in range(1, 12)]
        asked = {"prompt": "Once upon a time", **fields}
        return await asyncio.gather(*(stream("127.0.0.1", served.port, body) for body in [*bodies, asked]))

    *_, among = asyncio.run(crowd())
    assert among.token_ids == alone["token_ids"]
    assert ask(served, **fields, n=3).json()["choices"][0]["text"] == alone["text"]


def test_64_streams_with_random_departures_leave_nothing_behind(served: Served) -> None:
    rng = random.Random(1)

    async def visitor(i: int) -> None:
        body = {"prompt": "y" * rng.randint(1, 300), "max_tokens": rng.randint(1, 120), "seed": i}
        leaving = rng.random() < 0.5
        try:
            async with asyncio.timeout(rng.uniform(0, 1.5) if leaving else 60):
                await stream("127.0.0.1", served.port, body)
        except TimeoutError:
            assert leaving

    async def crowd() -> None:
        await asyncio.gather(*(visitor(i) for i in range(64)))

    before = served.metrics()
    asyncio.run(crowd())
    ask(served, max_tokens=2)  # a step later every departure has been dealt with
    ask(served, max_tokens=2)
    after = served.metrics()
    ended = sum(value for name, value in after.items() if name.startswith("millrace_requests_ended_total"))
    assert after["millrace_requests_accepted_total"] == ended + after["millrace_requests_in_flight"]
    assert after["millrace_requests_in_flight"] == after["millrace_requests_running"] == 0
    assert after["millrace_cache_use_ratio"] == 0
    cancelled = 'millrace_requests_ended_total{outcome="cancelled"}'
    assert after[cancelled] > before[cancelled], "nobody left early: the test shows nothing"


def test_every_outcome_is_told_as_what_it_is(served: Served) -> None:
    told = ask(served, max_tokens=400, timeout_s=0.05).json()["choices"][0]
    assert told["finish_reason"] == "timeout"
    assert ask(served, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
    first = ask(served, max_tokens=1, temperature=0).json()["choices"][0]["token_ids"]
    stopped = ask(served, temperature=0, stop_token_ids=first).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", first[0])


def signalled(running: Served, max_tokens: int) -> dict[str, Any]:
    """The terminal event of a stream whose server gets SIGTERM after its first line."""
    body = {"prompt": "a", "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", running.url("/generate"), json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        *_, last, done = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert done == "[DONE]"
    assert running.process.wait(timeout=60) == 0
    terminal: dict[str, Any] = json.loads(last)
    return terminal


def test_a_signal_ends_what_runs_with_a_terminal_event_and_exits_with_0(folder: Path) -> None:
    with serving(folder, "--drain-s", "0.2") as running:
        terminal = signalled(running, max_tokens=500)
    assert terminal["choices"][0]["finish_reason"] == "error"
    assert "shutting down" in terminal["error"]["detail"]


def test_a_signal_lets_what_is_nearly_done_finish(folder: Path) -> None:
    with serving(folder) as running:
        assert signalled(running, max_tokens=60)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("alive", "age_s", "told"),
    [(True, 0.0, None), (True, 31.0, "no progress"), (False, 0.0, "failed")],
)
async def test_readiness_follows_the_engine(alive: bool, age_s: float, told: str | None) -> None:
    with bind("127.0.0.1", 0) as listener:
        house = House(Settings.load(), listener)
        house.worker = cast(Any, SimpleNamespace(alive=alive, progress_age_s=lambda: age_s))
        house.door.backend.loaded(cast(Any, object()), house.broker)
        reason = house.door.backend.ready()
    assert (reason is None) if told is None else (reason is not None and told in reason)


def refusal(*flags: str) -> str:
    """The one line that a start was refused with."""
    process = start(*flags)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3, told
    assert told.count("\n") == 1, told
    return told


def test_a_used_port_is_told_at_once_with_the_fix(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port + 1}" in refusal("--model", str(folder), "--port", str(port))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--cache-gib", "0.00001"], "--cache-gib"),
        (["--max-model-len", "100000"], "--max-model-len"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        pytest.param(["--device", "cuda"], "--device cpu", marks=NO_GPU),
    ],
)
def test_mistakes_are_refused_in_one_line_that_names_them(folder: Path, flags: list[str], told: str) -> None:
    given = flags if "--model" in flags else ["--model", str(folder), *flags]
    assert told in refusal("--port", "0", *given)


def test_generate_writes_the_same_text_for_the_same_seed(folder: Path) -> None:
    command = [*COMMAND, "generate", "Once", "--model", str(folder), "--seed", "3", "--max-tokens", "20"]
    runs = [subprocess.run(command, capture_output=True, timeout=60, check=True, cwd=ROOT) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.startswith(b"Once") and len(runs[0].stdout) > 10
    assert b"20 tokens in" in runs[0].stderr and b"tokens/s, seed 3" in runs[0].stderr


def test_chat_talks_to_a_running_server_until_an_empty_line(served: Served, folder: Path) -> None:
    before = served.metrics()["millrace_requests_accepted_total"]
    command = [*COMMAND, "chat", "--url", served.url(""), "--model", str(folder), "--max-tokens", "5"]
    talk = subprocess.run(command, input="hello\nagain\n\n", capture_output=True, text=True, timeout=60, check=True)
    assert talk.stdout.count("> ") == 3
    assert served.metrics()["millrace_requests_accepted_total"] == before + 2


def test_chat_without_a_server_says_how_to_start_one(folder: Path) -> None:
    with bind("127.0.0.1", 0) as unused:
        command = [*COMMAND, "chat", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}", "--model", str(folder)]
        talk = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=60, check=False)
    assert talk.returncode == 3 and "millrace serve" in talk.stderr


def test_with_the_attention_view_the_last_tokens_weights_are_told(folder: Path) -> None:
    with serving(folder, "--attention-view") as running:
        assert httpx.get(running.url("/ready")).json()["attention_view"] is True
        told = httpx.post(running.url("/attention"), json={"token_ids": [72, 105, 33]}, timeout=60).json()
        assert len(told["tokens"]) == 3 and [len(layer) for layer in told["weights"]] == [4, 4]
        assert all(abs(sum(head) - 1) < 1e-3 for layer in told["weights"] for head in layer)
