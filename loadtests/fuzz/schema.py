"""Requests made from /openapi.json by schemathesis: such as fit it, and such as don't.

`python -m loadtests.fuzz.schema` sends them to a server, and prints what came back as one JSON object.
"""

import argparse
import http.client
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

BATCH = 20
BROKEN = range(500, 600)
ASKED_FOR = {504}  # by a `timeout_s` that is over
LEAKS = re.compile(rb"Traceback|File \"|site-packages|\w{0,3}\.py\b")
HUNG, CUT = -1, 0  # in place of a status
PATIENCE_S = 40.0  # for whatever a request may ask for: more than a server's own limits
BASE = "http://localhost"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to send."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Arm:
    """One operation, with requests that fit its schema or don't."""

    def __init__(self, operation: Any, mode: GenerationMode) -> None:
        self._operation, self._mode = operation, mode
        self.name = f"{operation.label} {mode.value}"
        self.has_body = bool(operation.body)

    def batch(self, num: int, number: int) -> list[Ask]:
        """The `number`th so many; fewer where there are not so many."""
        found: list[Ask] = []

        @seed(number)
        @settings(
            max_examples=num,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=self._operation.as_strategy(generation_mode=self._mode))
        def collect(case: Any) -> None:
            ask = _ask(case)
            if ask is not None:
                found.append(ask)

        try:
            collect()
        except Unsatisfiable:  # nothing of this operation can be wrong
            return []
        return found


def arms(api: dict[str, Any]) -> list[Arm]:
    """All that can be asked."""
    found = []
    for result in schemathesis.openapi.from_dict(api).get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # raises for what is no schema, as it should
        found.append(Arm(operation, GenerationMode.POSITIVE))
        if operation.body or operation.query or operation.headers:
            found.append(Arm(operation, GenerationMode.NEGATIVE))
    return found


def complaint(ask: Ask, status: int, body: bytes) -> str | None:
    """What is wrong with an answer; None if nothing. What the request said itself may be said back."""
    asked = b" ".join((ask.target.encode(), ask.body, *(value.encode() for value in ask.headers.values())))
    leaks = any(found[0] not in asked for found in LEAKS.finditer(body))
    if status == HUNG or (status in BROKEN and status not in ASKED_FOR) or leaks:
        return f"{ask.method} {ask.target[:200]} {ask.body[:300]!r} -> {status} {body[:300]!r}"
    return None


def _ask(case: Any) -> Ask | None:
    """None for what no client could send."""
    try:
        prepared = requests.Request(**case.as_transport_kwargs(base_url=BASE)).prepare()
        headers = {name: str(value) for name, value in prepared.headers.items() if name != "Connection"}
        for name, value in headers.items():
            (name + value).encode("latin-1")
    except (requests.RequestException, UnicodeError, ValueError):
        return None
    body = prepared.body or b""
    target = (prepared.url or BASE + "/").removeprefix(BASE)
    if not target.startswith("/") or not isinstance(body, str | bytes):
        return None
    return Ask(str(prepared.method), target, headers, body.encode() if isinstance(body, str) else body)


def main() -> None:
    """Ask until so many were asked, every operation for as long as the others."""
    parser = argparse.ArgumentParser()
    for name in ("port", "cases", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--key", required=True)
    args = parser.parse_args()
    os.nice(19)  # what the server does is to be measured, and not what it has to share a core with
    api = json.loads(_send(args.port, args.key, Ask("GET", "/openapi.json", {}, b""))[1])
    spent_s = dict.fromkeys(arms(api), 0.0)
    statuses: Counter[str] = Counter()
    complaints: list[str] = []
    number = args.seed
    while sum(statuses.values()) < args.cases:
        arm, number, begun_s = min(spent_s, key=lambda each: spent_s[each]), number + 1, time.monotonic()
        for ask in arm.batch(BATCH, number):
            status, body = _send(args.port, args.key, ask)
            statuses[str(status)] += 1
            found = complaint(ask, status, body)
            complaints += [found] if found else []
        spent_s[arm] += time.monotonic() - begun_s
    json.dump({"statuses": statuses, "complaints": complaints}, sys.stdout)


def _send(port: int, key: str, ask: Ask) -> tuple[int, bytes]:
    """Status and body; `CUT` if the server closed without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(ask.method, ask.target, ask.body, {**ask.headers, "Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        return HUNG, b""
    except (http.client.HTTPException, ConnectionError, ValueError):
        return CUT, b""
    finally:
        connection.close()


if __name__ == "__main__":
    main()
