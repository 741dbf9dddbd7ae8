"""Log lines for people and for machines."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service.logs import JsonFormatter, PlainFormatter, configure, fields
from tests.service.helpers_http import Door, say


def record(message: str = "request ended", **values: object) -> logging.LogRecord:
    made = logging.LogRecord("millrace", logging.INFO, "", 0, message, (), None)
    made.__dict__.update(fields(**values))
    return made


def test_a_plain_line_ends_with_its_fields() -> None:
    line = PlainFormatter().format(record(id="gen-1", tokens=3, queue_s=None))
    assert line.endswith(" INFO millrace: request ended id=gen-1 tokens=3")


def test_a_json_line_is_one_line_whatever_it_says() -> None:
    line = JsonFormatter().format(record("two\nlines", id="gen-1"))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["id"], told["level"]) == ("two\nlines", "gen-1", "info")


@pytest.fixture
def root_logger() -> Iterator[None]:
    root, sse = logging.getLogger(), logging.getLogger("sse_starlette")
    handlers, levels = root.handlers[:], (root.level, sse.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    sse.setLevel(levels[1])


@pytest.mark.usefixtures("root_logger")
async def test_a_request_leaves_one_line_without_its_text() -> None:
    stream = io.StringIO()
    configure("debug", as_json=True, stream=stream)
    await Door(say("a secret answer")).generate("a secret prompt", stream=True)
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if "request ended" in line]
    assert (line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == ("stop", 15, 15)
    assert line["tenant"] == "default" and line["request_id"]
    assert line["total_s"] >= line["ttft_s"]
    assert "secret" not in stream.getvalue()


@pytest.mark.usefixtures("root_logger")
async def test_a_refused_request_leaves_one_line_too() -> None:
    stream = io.StringIO()
    configure("info", as_json=True, stream=stream)
    await Door(say("x")).generate("a secret prompt", max_tokens=-1)
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if "refused" in line]
    assert (line["outcome"], line["code"], line["tenant"]) == ("refused", "invalid_request", "default")
    assert "secret" not in stream.getvalue()
