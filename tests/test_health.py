"""`millrace health` against real sockets: what it asks, what it says, and its exit code."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service.cli import main
from tests.faults.redis_server import free_port

ANSWERS = {"/ready": (503, b'{"detail": "no worker is alive"}'), "/health": (200, b"{}"), "/metrics": (200, b"a 1\n")}


class Program(BaseHTTPRequestHandler):
    """Alive, with an engine, and not ready."""

    def do_GET(self) -> None:
        status, body = ANSWERS[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Program) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the images, where a server listens on every address."""
    for name in ("HOST", "METRICS_HOST"):
        monkeypatch.setenv(f"MILLRACE_{name}", "0.0.0.0")


def health(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["health", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_who_is_alive_need_not_be_ready(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert health("--port", str(port)) == 1
    assert capsys.readouterr().err == f"127.0.0.1 port {port}/ready says 503: no worker is alive\n"
    assert health("--port", str(port), "--alive") == 0
    assert capsys.readouterr().out == f"127.0.0.1 port {port} is up\n"


def test_a_worker_is_asked_by_its_metrics_port(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_METRICS_PORT", str(port))
    assert health("--worker") == 0
    monkeypatch.delenv("MILLRACE_METRICS_PORT")
    assert health("--worker") == 3


def test_where_nobody_answers_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert health("--port", str(free_port())) == 1
    assert "does not answer" in capsys.readouterr().err
