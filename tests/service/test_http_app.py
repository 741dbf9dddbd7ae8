"""The door itself: loading, watching routes, request ids, HEAD, the page, and exceptions."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from service.errors import Unavailable
from service.http.backend import Backend
from service.http.problems import PROBLEMS
from tests.service.helpers_http import SERVED, Door


async def test_before_the_model_is_there_only_health_answers() -> None:
    door = Door(loaded=False)
    assert (await door.ask("GET", "/health")).status_code == 200
    for method, path in (("GET", "/ready"), ("POST", "/generate"), ("GET", "/v1/models")):
        response = await door.ask(method, path)
        told = response.json()
        assert (response.status_code, told["error"]["message"] if "error" in told else told["detail"]) == (
            503,
            "loading",
        )
        assert int(response.headers["retry-after"]) > 0
    door.backend.loaded(SERVED, door.broker)
    assert (await door.ask("GET", "/ready")).status_code == 200
    assert (await door.generate()).status_code == 200


async def test_a_reason_to_stay_away_closes_the_door_again() -> None:
    door, reasons = Door(), ["draining"]
    door.backend._watch = lambda: reasons[0] if reasons else None
    assert (await door.ask("GET", "/ready")).json()["detail"] == "draining"
    assert (await door.generate()).status_code == 503
    reasons.clear()
    assert (await door.ask("GET", "/ready")).json() == {"status": "ready"}


async def test_ready_may_be_stricter_than_the_door_and_tell_facts() -> None:
    reasons = ["no worker"]
    door = Door(backend=Backend(lambda: reasons[0] if reasons else None, lambda: None, lambda: {"workers": 2}))
    assert (await door.ask("GET", "/ready")).json()["detail"] == "no worker"
    assert (await door.generate()).status_code == (await door.read()).status_code == 200
    reasons.clear()
    assert (await door.ask("GET", "/ready")).json() == {"status": "ready", "workers": 2}


async def test_a_door_that_refuses_still_cancels() -> None:
    refusals: list[str] = []
    door = Door(backend=Backend(refuse=lambda: refusals[0] if refusals else None))
    url = f"/generate/{(await door.generate()).json()['id']}"
    refusals.append("draining")
    for method in ("POST", "GET"):
        response = await door.ask(method, "/generate" if method == "POST" else url)
        assert (response.status_code, response.json()["detail"]) == (503, "draining")
    assert (await door.ask("GET", "/ready")).status_code == 200
    assert (await door.ask("DELETE", url)).status_code == 202


async def test_what_is_served_may_be_replaced() -> None:
    door = Door()
    door.backend.loaded(replace(SERVED, name="other"), door.broker)
    assert (await door.generate()).json()["model"] == "other"


def test_a_backend_is_loading_until_it_is_told_otherwise() -> None:
    assert Backend(lambda: None).ready() == "loading"


async def test_models_are_listed_as_clients_expect() -> None:
    listed = (await Door().ask("GET", "/v1/models")).json()
    card = {"id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "millrace", "max_model_len": 64}
    assert listed == {"object": "list", "data": [card]}


async def test_metrics_ask_the_queue() -> None:
    response = await Door().ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "millrace_requests_waiting 7.0" in response.text
    assert "millrace_requests_running 2.0" in response.text


async def test_metrics_are_told_while_the_queue_is_away() -> None:
    door = Door()
    door.broker.away = Unavailable("the queue can't be reached")
    response = await door.ask("GET", "/metrics")
    assert (response.status_code, "millrace_requests_accepted_total 0.0" in response.text) == (200, True)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json"])
async def test_head_is_get_without_the_body(path: str) -> None:
    door = Door()
    head, get = await door.ask("HEAD", path), await door.ask("GET", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(("given", "kept"), [("a.B-c_9", True), ("x" * 65, False), ("a b", False), ("", False)])
async def test_a_request_id_is_taken_or_made_and_always_returned(given: str, kept: bool) -> None:
    for path in ("/health", "/nowhere"):
        told = (await Door().ask("GET", path, headers={"x-request-id": given})).headers["x-request-id"]
        assert (told == given) is kept
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", told)


async def test_what_does_not_exist_is_a_problem_too() -> None:
    door = Door()
    missing, wrong = await door.ask("GET", "/generat"), await door.ask("GET", "/generate")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert missing.headers["content-type"] == "application/problem+json"


async def test_an_unknown_model_is_not_found() -> None:
    response = await Door().generate(model="other")
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


async def test_a_bug_is_a_500_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    door.broker.refusal = RuntimeError("/a/secret/path")
    response = await door.generate()
    assert (response.status_code, response.json()["detail"]) == (500, "internal error")
    assert "x-request-id" in response.headers
    assert "/a/secret/path" in caplog.text


async def test_openapi_tells_every_field_and_every_problem() -> None:
    api = (await Door().ask("GET", "/openapi.json")).json()
    post = api["paths"]["/generate"]["post"]
    assert "prompt" in post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    told = " ".join(response["description"] for response in post["responses"].values())
    assert set(re.findall(r"([a-z_]+): ", told)) >= set(PROBLEMS) - {
        "not_found",
        "method_not_allowed",
        "cancelled",
        "timeout",
    }


async def test_openapi_tells_how_to_read_again_and_how_to_cancel() -> None:
    paths = (await Door().ask("GET", "/openapi.json")).json()["paths"]
    post, read, cancel = paths["/generate"]["post"], paths["/generate/{id}"]["get"], paths["/generate/{id}"]["delete"]
    assert [parameter["name"] for parameter in post["parameters"]] == ["Idempotency-Key"]
    names = ["id", "Last-Event-ID", "after", "stream", "progress"]
    assert [parameter["name"] for parameter in read["parameters"]] == names
    assert set(post["responses"]) >= {"200", "202", "409", "422"}
    assert set(post["responses"]["202"]["headers"]) == {"Location"}
    assert set(read["responses"]) == {"200", "401", "404", "422", "500", "503"}
    assert set(cancel["responses"]) == {"202", "401", "404", "422", "503"}
    assert "interleaved" in read["responses"]["200"]["description"]


def test_the_http_half_starts_without_torch() -> None:
    check = "import sys, service.http.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
