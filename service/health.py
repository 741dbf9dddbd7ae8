"""`millrace health`: asks a server or a worker on this machine how it is, for a container that has no other program to
ask with.

A part of the composition root, without torch. It knows three paths and no metric. The answer is an exit code and a
line.
"""

import json
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

from service.settings import Settings, SettingsError

PATIENCE_S = 2.0  # less than the time that a container's supervisor gives
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens everywhere is asked on loopback
LONGEST_TOLD = 200


def ask(settings: Settings, *, worker: bool, alive: bool) -> tuple[bool, str]:
    """Whether it is well, and a line that says so or why not: an api or server by /ready, or by /health for `alive`; a
    `worker` by its metrics, which its engine process answers itself. Raises `SettingsError` without a port to ask."""
    host, port, path = settings.host, settings.port, "/health" if alive else "/ready"
    if worker:
        if not settings.metrics_port:
            raise SettingsError("--metrics-port or MILLRACE_METRICS_PORT: missing; a worker is asked through it")
        host, port, path = settings.metrics_host, settings.metrics_port, "/metrics"
    where = f"{ANYWHERE.get(host, host)} port {port}"
    connection = HTTPConnection(ANYWHERE.get(host, host), port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(65_536)
    except (OSError, HTTPException) as error:
        return False, f"{where} does not answer: {error}"
    finally:
        connection.close()
    if response.status == 200:
        return True, f"{where} is {'up' if worker or alive else 'ready'}"
    return False, f"{where}{path} says {response.status}: {_reason(body)}"


def _reason(body: bytes) -> str:
    """The sentence in an answer of ours, or the answer's beginning."""
    with suppress(ValueError, LookupError, TypeError):
        return str(json.loads(body)["detail"])
    return body.decode("utf-8", "replace")[:LONGEST_TOLD]
