"""Locust users that stream stories: `make load`, or `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`.

Beside the requests themselves, two rows tell what a reader feels: the wait for the first token and the time between
tokens (the mean of each stream), in milliseconds.
"""

import json
import random
import time
from collections.abc import Iterable

from locust import HttpUser, between, task

OPENINGS = (
    "Once upon a time there was a king who",
    '"Where are you going?" asked the fox.',
    "The little girl looked out of the window and saw",
    "Far away, in the middle of the forest,",
)


class Reader(HttpUser):
    """Asks for a story, reads it to the end, thinks for a moment."""

    wait_time = between(0.5, 2.0)

    @task
    def story(self) -> None:
        body = {"prompt": random.choice(OPENINGS), "max_tokens": random.randint(16, 128), "stream": True}
        started = time.perf_counter()
        with self.client.post("/generate", json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            times, ended = read(response.iter_lines())
            if not ended:
                response.failure("the stream ended without a terminal event")
                return
        self.note("first token", (times[0] - started) * 1e3)
        if len(times) > 1:
            self.note("between tokens", (times[-1] - times[0]) / (len(times) - 1) * 1e3)

    def note(self, name: str, milliseconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=milliseconds, response_length=0, exception=None, context={}
        )


def read(lines: Iterable[bytes]) -> tuple[list[float], bool]:
    """When each token came, and whether a terminal event and `[DONE]` came after them."""
    times: list[float] = []
    terminal = False
    for line in lines:
        if line == b"data: [DONE]":
            return times, terminal
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            terminal = "usage" in event
            if not terminal and "error" not in event:
                times.append(time.perf_counter())
    return times, False
