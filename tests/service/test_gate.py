"""Who is let in: keys on every route, hosts, pages of other origins, and who one is behind the gate."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from service.door import Door as ServingDoor
from service.door import rules
from service.errors import StartupError
from service.http.app import create_app
from service.http.backend import Backend
from service.http.gate import METRICS, OPEN, PAGE_PREFIX, Rules
from service.keys import Keyring, add_key
from service.listen import bind
from service.metrics import Metrics
from service.scrape import scraped
from service.settings import Settings, SettingsError
from tests.service.helpers_http import SERVED, Door

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ODD_HOSTS = [["a/healthz?"], ["a?"], ["a#"], ["a\\b"], ["a@b"], ["a b"], [""], [], ["a", "b"], ["test", "test"]]


class GuardedDoor(Door):
    """One with rules. `key` is ada's, `other` bob's."""

    def __init__(self, file: Path | None, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = ()) -> None:
        super().__init__()
        if file is not None:
            self.key, self.other = add_key(file, "ada"), add_key(file, "bob")
        self.ring = None if file is None else Keyring(file)
        self.app = create_app(self.backend, self.metrics, rules=Rules(hosts, origins, self.ring))


@pytest.fixture
def door(tmp_path: Path) -> GuardedDoor:
    return GuardedDoor(tmp_path / "keys.json")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def routes() -> Iterator[tuple[str, str]]:
    """Every route there is, with a method it takes, and some that there are not."""
    for route in create_app(Backend(), Metrics()).routes:
        path = getattr(route, "path", "").replace("{", "").replace("}", "").replace(":path", "")
        for method in getattr(route, "methods", None) or ("GET",):
            yield method, path
    for path in ("/nowhere", "/v1/nowhere", "/health/", "//health", "/health/..", "/HEALTH", "/ready%2f", "/page", "*"):
        yield "GET", path


async def raw(door: Door, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Past every client library, which would not send such things: the status and the body."""
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: object) -> None:
        sent.append(dict(message))  # type: ignore[call-overload]

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "scheme": "http", "http_version": "1.1", "server": ("test", 80), "root_path": ""}
    await door.app(scope, receive, send)
    body = b"".join(bytes(message.get("body", b"")) for message in sent)  # type: ignore[call-overload]
    return int(str(sent[0]["status"])), body


@pytest.mark.parametrize(("method", "path"), sorted(set(routes())))
async def test_every_route_but_the_open_ones_needs_a_key(door: GuardedDoor, method: str, path: str) -> None:
    status, _ = await raw(door, method, path, [(b"host", b"test")])
    is_open = path in OPEN or path.startswith(PAGE_PREFIX)
    assert (status != 401) if is_open else (status == 401)


def test_what_is_open_is_what_was_meant_to_be() -> None:
    paths = {route.path for route in create_app(Backend(), Metrics()).routes if isinstance(route, APIRoute)}
    opened = {path for path in paths if path in OPEN or path.startswith(PAGE_PREFIX)}
    assert {path for path in opened if not path.startswith(PAGE_PREFIX)} <= {
        *("/", "/health", "/ready", "/docs", "/docs/docs.js", "/docs/docs.css")
    }
    assert not any("{" in path for path in opened)


@pytest.mark.parametrize("hosts", ODD_HOSTS)
async def test_no_host_header_gets_past_the_gate(door: GuardedDoor, hosts: list[str]) -> None:
    headers = [(b"host", host.encode()) for host in hosts]
    for method, path in set(routes()):
        if path not in OPEN and not path.startswith(PAGE_PREFIX):
            status, _ = await raw(door, method, path, headers)
            assert status in (400, 401), (method, path, status)


async def test_with_a_key_everything_goes(door: GuardedDoor) -> None:
    for headers in (bearer(door.key), {"authorization": f"bearer  {door.key}"}, {"X-API-Key": door.key}):
        response = await door.ask("POST", "/generate", json={"prompt": "hi"}, headers=headers)
        assert response.status_code == 200, response.text
    assert {request.tenant for request in door.broker.requests} == {"ada"}


@pytest.mark.parametrize("scheme", ["Bearer ", "Basic ", "", "bearer\t", "Bearer mr-", "Bearer Bearer "])
async def test_what_is_not_quite_a_key_is_none(door: GuardedDoor, scheme: str) -> None:
    given = {"Bearer ": door.key[:-1], "Bearer mr-": door.key}.get(scheme, door.key)
    response = await door.ask("GET", "/v1/models", headers={"Authorization": scheme + given})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert given not in response.text


async def test_two_keys_are_no_key(door: GuardedDoor) -> None:
    twice = [(b"host", b"test")] + [(b"authorization", f"Bearer {door.key}".encode())] * 2
    assert (await raw(door, "GET", "/v1/models", twice))[0] == 401


async def test_another_tenants_requests_do_not_exist(door: GuardedDoor) -> None:
    made = await door.ask("POST", "/generate", json={"prompt": "hi"}, headers=bearer(door.key))
    url = f"/generate/{made.json()['id']}"
    for method, path in (("GET", url), ("DELETE", url)):
        assert (await door.ask(method, path, headers=bearer(door.other))).status_code == 404
    assert (await door.ask("GET", url, headers=bearer(door.key))).status_code == 200
    assert not door.broker.cancelled


async def test_with_keys_metrics_are_not_here(door: GuardedDoor) -> None:
    assert (await door.ask("GET", METRICS, headers=bearer(door.key))).status_code == 404
    assert (await door.ask("GET", METRICS)).status_code == 401


async def test_without_keys_a_key_is_not_looked_at() -> None:
    door = GuardedDoor(None)
    for headers in ({}, bearer("mr-whatever"), {"X-API-Key": "x"}):
        assert (await door.ask("POST", "/generate", json={"prompt": "hi"}, headers=headers)).status_code == 200
    assert {request.tenant for request in door.broker.requests} == {"default"}
    assert (await door.ask("GET", METRICS)).status_code == 200


# --- hosts and origins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("127.0.0.1", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.nip.io", 403),
        ("localhost:80:80", 400),
        ("localhost/", 400),
        ("user@localhost", 400),
    ],
)
async def test_only_the_hosts_that_are_ours_are_answered(host: str, status: int) -> None:
    door = GuardedDoor(None, hosts=("localhost", "127.0.0.1", "[::1]"))
    assert (await door.ask("GET", "/v1/models", headers={"Host": host})).status_code == status
    assert (await door.ask("GET", "/", headers={"Host": host})).status_code != 200 or status == 200


async def test_a_host_with_a_port_is_allowed_with_that_port_only() -> None:
    door = GuardedDoor(None, hosts=("chat.example:8443",))
    for host, status in (("chat.example:8443", 200), ("chat.example", 403), ("chat.example:80", 403)):
        assert (await door.ask("GET", "/v1/models", headers={"Host": host})).status_code == status


async def test_load_balancers_call_by_address() -> None:
    door = GuardedDoor(None, hosts=("chat.example",))
    for path in ("/health", "/ready"):
        assert (await raw(door, "GET", path, [(b"host", b"10.0.0.7:8000")]))[0] == 200
        assert (await raw(door, "GET", path, []))[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://test", 200),
        ("https://chat.example", 200),
        ("https://evil.example", 403),
        ("http://test.evil.example", 403),
        ("null", 403),
        ("https://chat.example.evil", 403),
        ("https://chat.example:444", 403),
    ],
)
async def test_pages_of_other_origins_may_not_ask(door: GuardedDoor, origin: str, status: int) -> None:
    guarded = GuardedDoor(None, origins=("https://chat.example",))
    response = await guarded.ask("POST", "/generate", json={"prompt": "hi"}, headers={"Origin": origin})
    assert response.status_code == status
    named = response.headers.get("access-control-allow-origin")
    assert named == (origin if origin == "https://chat.example" else None)
    assert "access-control-allow-credentials" not in response.headers
    assert response.headers["vary"] == "Origin"


async def preflight(door: Door, origin: str) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return await door.ask("OPTIONS", "/v1/models", headers=headers)


async def test_a_preflight_needs_no_key_but_the_right_origin(tmp_path: Path) -> None:
    door = GuardedDoor(tmp_path / "keys.json", origins=("https://chat.example",))
    asked = await preflight(door, "https://chat.example")
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == "https://chat.example"
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    assert "DELETE" in asked.headers["access-control-allow-methods"]
    for origin in ("https://evil.example", "null", "*"):
        assert (await preflight(door, origin)).status_code == 403


async def test_a_page_that_may_ask_can_read_why_it_was_refused(tmp_path: Path) -> None:
    door = GuardedDoor(tmp_path / "keys.json", origins=("https://chat.example",))
    refusal = await door.ask("GET", "/v1/models", headers={"Origin": "https://chat.example"})
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == "https://chat.example"
    assert "retry-after" in refusal.headers["access-control-expose-headers"]


async def test_refusals_are_counted_and_have_a_request_id(door: GuardedDoor) -> None:
    response = await door.ask("POST", "/generate", json={"prompt": "hi"}, headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (401, "mine")
    count = door.metrics.registry.get_sample_value
    assert count("millrace_requests_refused_total", {"reason": "invalid_api_key"}) == 1


async def test_a_key_that_was_taken_away_is_refused_after_a_reload(door: GuardedDoor, tmp_path: Path) -> None:
    assert (await door.ask("GET", "/v1/models", headers=bearer(door.key))).status_code == 200
    (tmp_path / "keys.json").unlink()
    new = add_key(tmp_path / "keys.json", "eve")
    assert door.ring is not None
    door.ring.reload()
    assert (await door.ask("GET", "/v1/models", headers=bearer(door.key))).status_code == 401
    assert (await door.ask("GET", "/v1/models", headers=bearer(new))).status_code == 200
    assert SERVED.name


# --- what a start makes of its settings ------------------------------------------------------------------------------


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MILLRACE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", "127.0.0.1.example", "::ffff:0:0"])
def test_without_keys_it_does_not_listen_beyond_this_machine(no_settings: None, host: str) -> None:
    with pytest.raises(
        StartupError, match=r"--host .*--api-keys-file .*millrace keys add.*--insecure-no-auth"
    ) as refusal:
        rules(Settings.load(host=host))
    assert "\n" not in str(refusal.value)
    assert rules(Settings.load(host=host, insecure_no_auth=True)) == Rules()


def test_with_keys_it_may(no_settings: None, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(StartupError, match="can't be read"):
        rules(Settings.load(host="0.0.0.0", api_keys_file=file))
    add_key(file, "ada", weight=3.0)
    made = rules(Settings.load(host="0.0.0.0", api_keys_file=file))
    assert made.keyring is not None and made.keyring.weights == {"ada": 3.0}
    assert made.hosts == ()


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("127.0.0.9", "127.0.0.9")])
def test_on_loopback_only_its_own_names_are_answered(no_settings: None, host: str, named: str) -> None:
    assert set(rules(Settings.load(host=host)).hosts) == {"localhost", "127.0.0.1", "[::1]", named}
    told = rules(Settings.load(host=host, allowed_hosts="chat.example, chat.example:8443")).hosts
    assert told == ("chat.example", "chat.example:8443")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cors_origin", "*"),
        ("cors_origin", "null"),
        ("cors_origin", "https://*.example"),
        ("cors_origin", "https://a.example/"),
        ("cors_origin", "a.example"),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "http://a"),
        ("allowed_hosts", "a b"),
    ],
)
def test_a_wildcard_is_no_origin_and_no_host(no_settings: None, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}"):
        Settings.load(**{name: value})


def test_several_origins_and_hosts_reach_a_child_process(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load(cors_origin=["https://a.example", "app://b"], allowed_hosts="a,b:1,[::1]")
    monkeypatch.setattr(os, "environ", settings.environment())
    assert Settings.load() == settings


async def test_a_broken_key_file_changes_nothing_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = add_key(tmp_path / "keys.json", "ada")
    ring = Keyring(tmp_path / "keys.json")
    (tmp_path / "keys.json").write_text("[]")
    ServingDoor._reload(ring)
    assert ring.tenant(key.encode()) is not None and "the keys are what they were" in caplog.text


async def test_metrics_have_a_port_of_their_own(no_settings: None) -> None:
    async def exposition(accept: str) -> tuple[bytes, str]:
        return b"millrace 1\n", "text/plain"

    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    async with scraped(Settings.load(metrics_port=port), exposition), httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}"
        told = await client.get(f"{url}/metrics")
        assert (told.status_code, told.text) == (200, "millrace 1\n")
        for method, path in (("GET", "/"), ("POST", "/metrics"), ("GET", "/health"), ("GET", "/metrics/")):
            assert (await client.request(method, url + path)).status_code == 404
