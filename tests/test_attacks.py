"""Attacks that other servers of models have suffered, tried on ours. Each test is named after what it tries, with the
advisory it is known by.

One real server with keys stands for them all: at the end it still lives, has answered nobody with a 5xx, has opened no
connection to anywhere, and has not logged what it was told.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgpack
import psutil
import pytest

from service.broker.codec import CodecError, decode_entry, decode_request
from service.keys import add_key
from service.settings import Settings
from tests.model.conftest import TINY, random_decoder, save_folder
from tests.service.helpers_http import TOKENIZER, Door, events_of, say
from tests.test_serve import Served, serving

ROOT = Path(__file__).parent.parent
SECRET = "a secret that no log may tell"


@dataclass
class House:
    """A server, a client of it with ada's key, and one without any."""

    server: Served
    client: httpx.Client
    stranger: httpx.Client
    other: httpx.Client
    folder: Path

    def ask(self, **fields: Any) -> httpx.Response:
        return self.client.post("/generate", json={"prompt": SECRET, "max_tokens": 2, **fields})

    def say(self, text: bytes) -> bytes:
        """Past every client library: what comes back first."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as client:
            client.sendall(text)
            return client.recv(65536)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = save_folder(random_decoder(TINY), tmp_path_factory.mktemp("attacks") / "tiny")
    keys = folder.parent / "keys.json"
    ada, bob = add_key(keys, "ada"), add_key(keys, "bob")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLRACE_LOG_LEVEL", "debug")
        with (
            open(folder.parent / "log", "w+", encoding="utf-8") as log,
            serving(folder, "--api-keys-file", str(keys), log=log.fileno()) as server,
        ):
            clients = [httpx.Client(base_url=server.url(""), timeout=60) for _ in range(3)]
            clients[0].headers["Authorization"], clients[2].headers["Authorization"] = f"Bearer {ada}", f"Bearer {bob}"
            yield House(server, clients[0], clients[1], clients[2], folder)
            for client in clients:
                client.close()
            unharmed(server, folder.parent / "log")


def unharmed(server: Served, log: Path) -> None:
    """After all of it."""
    process = psutil.Process(server.process.pid)
    elsewhere = [each for each in process.net_connections() if each.laddr and each.laddr.port != server.port]
    assert server.process.poll() is None and not elsewhere
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0
    told = log.read_text(encoding="utf-8")
    assert "request ended" in told and SECRET not in told and "Traceback" not in told


def told(response: httpx.Response) -> dict[str, Any]:
    """A refusal that gives nothing of the inside away."""
    assert 400 <= response.status_code < 500, response.text
    assert not re.search(r"Traceback|File \"|\.py\b|/tmp|/home|/usr|site-packages", response.text), response.text
    answer: dict[str, Any] = response.json()
    return answer


class Exploit:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._canary}",)


# --- 3.1: code that comes with a request or a model ------------------------------------------------------------------


def test_pickles_from_the_queue_are_not_read__cve_2025_32444(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Exploit(canary))
    for raw in (payload, msgpack.packb([1, payload]), msgpack.packb([1, payload, 1, (), None]), b"\x80\x04."):
        for decode in (decode_request, decode_entry):
            with pytest.raises(CodecError):
                decode(raw)
    assert not canary.exists()


def test_it_listens_on_this_machine_only_unless_told__cve_2026_3059() -> None:
    assert Settings.model_fields["host"].default == "127.0.0.1"


@pytest.mark.parametrize(
    "field",
    [
        *("logits_processors", "custom_logit_processor", "chat_template", "chat_template_kwargs", "prompt_embeds"),
        *("guided_decoding_backend", "adapters", "lora_path", "model_path", "trust_remote_code", "best_of"),
    ],
)
def test_clients_send_no_code_and_no_tensors__cve_2026_7304(house: House, field: str) -> None:
    answer = told(house.ask(**{field: "os.system('true')"}))
    assert answer["errors"][0]["field"] == field


HOSTILE_FOLDERS = """
import json, pathlib, sys
from model.chat_template import ChatTemplateError
from model.config import CheckpointError
from model.engine.engine import Engine
from model.tokenizer import Tokenizer

for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        engine = Engine.load(folder, device="cpu", dtype="float32")
        engine.tokenizer.render_chat([{"role": "user", "content": "hi"}])
        print(folder.name, "loaded")
    except (CheckpointError, ChatTemplateError) as error:
        print(folder.name, "refused", error)
"""
EVIL = "import pathlib; pathlib.Path({!r}).touch()\nclass Model: pass\n"


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_a_models_folder_runs_nothing__cve_2025_66448_cve_2026_41523(
    house: House, tmp_path: Path, flags: list[str]
) -> None:
    canary, folders = tmp_path / "canary", tmp_path / "folders"
    for name in ("auto_map", "pickle", "template"):
        shutil.copytree(house.folder, folders / name)
    config = json.loads((house.folder / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "modeling_evil.Model")
    (folders / "auto_map/config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for name in ("modeling_evil.py", "__init__.py", "tokenization_evil.py"):
        (folders / "auto_map" / name).write_text(EVIL.format(str(canary)))
    (folders / "auto_map/tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "chat_template": "x"}))
    (folders / "pickle/model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (folders / "pickle" / name).write_bytes(pickle.dumps(Exploit(canary)))
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    (folders / "template/chat_template.jinja").write_text(evil)
    command = [sys.executable, *flags, "-c", HOSTILE_FOLDERS, str(folders)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT, check=True)
    outcomes = dict(line.split(" ")[:2] for line in run.stdout.splitlines())
    assert outcomes == {"auto_map": "loaded", "pickle": "refused", "template": "refused"}, run.stdout
    assert not canary.exists()


async def test_what_a_model_writes_is_text__cve_2025_64496() -> None:
    evil = 'a\r\nevent: x\r\ndata: y\n\nid: 7\n\n]]></script>"}\n\ndata: [DONE]\n\n\u2028'
    response = await Door(say(evil)).generate(stream=True)
    assert "\nevent:" not in response.text and "\r" not in response.text
    assert "".join(event["choices"][0]["text"] for event in events_of(response.text)) == evil


def test_there_is_nothing_to_upload_to__cve_2026_7302(house: House) -> None:
    before = sorted(path for path in house.folder.parent.rglob("*"))
    for path in (
        "/upload",
        "/v1/files",
        "/v1/adapters",
        "/../../etc/passwd",
        "/page/..%2f..%2fapp.py",
        "/page/../app.py",
    ):
        for method in ("POST", "PUT"):
            assert house.client.request(method, path, files={"file": ("../../evil.py", b"x")}).status_code in (404, 405)
        assert house.client.get(path).status_code in (404, 405)
    assert sorted(path for path in house.folder.parent.rglob("*")) == before


# --- 3.2: getting in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a/healthz?", "a?", "a#", "a\\b", "", "localhost/health?", "localhost:80@x", "[::1"])
def test_a_host_header_does_not_change_the_path__cve_2026_48746(house: House, host: str) -> None:
    for path in ("/v1/models", "/generate", "/metrics", "/openapi.json"):
        answer = house.say(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer
    for target in ("http://localhost/health", "http://x/health?a=/v1/models", "//localhost/health"):
        answer = house.say(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-Original-URL: {target}\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer


@pytest.mark.parametrize("target", ["http://localhost/v1/models", "http://x/health/../v1/models", "http://health", "*"])
def test_an_absolute_target_needs_a_key_too__cve_2026_48710(house: House, target: str) -> None:
    answer = house.say(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/docs"])
def test_the_open_routes_are_open_and_the_others_are_not__vllm_api_key(house: House, path: str) -> None:
    assert house.stranger.get(path).status_code == 200
    for closed in ("/v1/models", "/metrics", "/openapi.json", "/generate/x", "/nowhere", f"{path.rstrip('/')}/x"):
        if closed != "/health":
            assert house.stranger.get(closed).status_code == 401, closed


def test_pages_elsewhere_do_not_reach_a_server_on_loopback__cve_2024_28224(house: House) -> None:
    for headers in ({"Host": "rebound.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        response = house.client.post("/generate", json={"prompt": "hi"}, headers=headers)
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_no_parameter_opens_what_is_inside__cve_2026_45365(house: House) -> None:
    made = house.ask().json()["id"]
    for query in ("bypass_filter=true", "tenant=ada", "client=ada", "served=1", "backend=x", "request=1", "id=1"):
        assert house.other.get(f"/generate/{made}?{query}").status_code == 404
        assert house.stranger.get(f"/v1/models?{query}").status_code == 401


def test_what_belongs_to_others_does_not_exist__cve_2026_45402(house: House) -> None:
    key = {"Idempotency-Key": "same"}
    body = {"prompt": "x", "max_tokens": 2}
    first, second = (
        client.post("/generate", json=body, headers=key).json()["id"] for client in (house.client, house.other)
    )
    assert first != second
    assert len(first.removeprefix("gen-")) * 4 >= 128  # bits
    for method in ("GET", "DELETE"):
        assert house.other.request(method, f"/generate/{first}").status_code == 404
    assert house.client.get(f"/generate/{first}", params={"stream": "false"}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b'{"prompt": 1}', b'{"prompt": "x", "stop": [1]}', b"[[[", b'{"a": 1e999}']
)
def test_refusals_tell_nothing_of_the_inside__cve_2026_73555(house: House, body: bytes) -> None:
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        told(house.client.post(path, content=body, headers={"Content-Type": "application/json"}))


def test_long_input_is_not_echoed__cve_2026_34760(house: House) -> None:
    for fields in ({"x" * 5000: 1}, {"model": "m" * 150}, {"stop": "s" * 5000}, {"seed": 10**300}):
        assert len(house.ask(**fields).text) < 2000
    assert len(house.client.get("/generate/" + "y" * 5000).text) < 1000


@pytest.mark.parametrize("method", ["__class__", "X-FOO", "get", "__init__", "TRACE", "CONNECT", "PROPFIND"])
def test_a_method_is_not_looked_up__cve_2026_48817(house: House, method: str) -> None:
    assert house.say(f"{method} /health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 4")


# --- 3.3: bringing it down -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"n": 9}, {"n": 10**6}, {"n": -1}, {"best_of": 10**6}, {"prompt": ""}, {"prompt": []}, {"max_tokens": -1}],
)
def test_one_request_does_not_become_many__cve_2026_34756_cve_2024_8768(house: House, fields: dict[str, Any]) -> None:
    told(house.ask(**fields))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", '"1"', "true", "-1", "1e308", "null1"])
def test_numbers_that_are_none_stay_out_of_kernels__cve_2026_54235(house: House, value: str) -> None:
    for field in ("temperature", "top_p", "repetition_penalty"):
        body = f'{{"prompt": "x", "max_tokens": 1, "{field}": {value}}}'
        told(house.client.post("/generate", content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("bad", [256, -1, 2**31, 2**63, 10**30])
def test_token_ids_outside_the_vocabulary_stay_out__vllm_16529(house: House, bad: int) -> None:
    for fields in (
        {"logit_bias": {str(bad): 1}},
        {"prompt": [bad]},
        {"stop_token_ids": [bad]},
        {"prompt": [1, bad, 1]},
    ):
        told(house.ask(**fields))
    for key in ("1e3", "07", " 7", "٧", "7.0", "-0"):
        told(house.ask(logit_bias={key: 1}))
    told(house.ask(logit_bias={str(i): 1 for i in range(10_000)}))
    assert house.ask().status_code == 200


@pytest.mark.parametrize("field", ["prompt_logprobs", "echo_logprobs", "return_hidden_states"])
def test_nobody_asks_for_a_matrix_of_the_whole_vocabulary__vllm_5907(house: House, field: str) -> None:
    told(house.ask(**{field: 100}))
    told(house.ask(logprobs=21))


@pytest.mark.parametrize("unit", ["a", " ", "é", "\u0301", "😀", "</s>", "<|", "\n", "a b", "1"])
def test_tokenising_takes_time_in_proportion__cve_2025_46560(unit: str) -> None:
    num = 50_000 // len(unit.encode())

    def spent_s(times: int) -> float:
        begun_s = time.thread_time()
        TOKENIZER.encode(unit * num * times)
        return time.thread_time() - begun_s

    assert min(spent_s(4) for _ in range(2)) < 10 * max(min(spent_s(1) for _ in range(3)), 0.005)


def test_a_header_may_not_grow_for_ever__cve_2025_48956(house: House) -> None:
    assert house.say(b"GET /health HTTP/1.1\r\nHost: localhost\r\na: " + b"x" * 2**20).startswith(b"HTTP/1.1 431")


def test_a_body_is_counted_before_it_is_kept__cve_2026_54283(house: House) -> None:
    process = psutil.Process(house.server.process.pid)
    before = process.memory_info().rss

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 2**20

    with pytest.raises(httpx.TransportError):  # cut, or answered before it was all sent
        response = house.client.post("/generate", content=endless(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        raise httpx.TransportError("answered")
    assert process.memory_info().rss - before < 64 * 2**20


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data"]
)
def test_the_server_fetches_nothing_for_anybody__cve_2026_0599(house: House, url: str) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]
    told(house.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}))


def test_forms_and_ranges_are_not_read__cve_2025_62727(house: House) -> None:
    assert house.client.post("/generate", files={"prompt": b"x"}).status_code == 415
    assert house.client.post("/generate", data={"prompt": "x"}).status_code == 415
    ranges = "bytes=" + ",".join(f"{i}-{i}" for i in range(1000))
    assert house.client.get("/docs", headers={"Range": ranges}).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_bodies_are_not_unpacked__cve_2024_12886(house: House, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    bomb = gzip.compress(b'{"prompt": "' + b" " * 10**7 + b'"}')
    assert house.client.post("/generate", content=bomb, headers=headers).status_code == 415


def test_departures_leave_nothing_behind__cve_2026_9540(house: House) -> None:
    process = psutil.Process(house.server.process.pid)
    before = process.num_fds()
    for _ in range(30):
        with house.client.stream(
            "POST", "/generate", json={"prompt": "x", "max_tokens": 400, "stream": True}
        ) as stream:
            next(stream.iter_lines())
    until_s = time.monotonic() + 20
    while process.num_fds() > before + 2 and time.monotonic() < until_s:
        time.sleep(0.1)
    assert process.num_fds() <= before + 2
    assert house.ask().status_code == 200
