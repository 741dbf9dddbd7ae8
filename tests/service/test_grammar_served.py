"""Structured output from a body to an answer: the door, a broker, a worker and an engine, in one process."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from service.broker.memory import MemoryBroker
from service.http.backend import Backend
from service.worker import Worker
from tests.model.conftest import TINY, random_decoder
from tests.service.helpers_http import SERVED, Door

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Before a small random network."""
    engine = Engine(random_decoder(TINY), SERVED.tokenizer, EngineConfig(max_model_len=256, num_blocks=128))
    broker, backend = MemoryBroker(max_waiting=99, max_waiting_tokens=9999), Backend()
    backend.loaded(replace(SERVED, eos_ids=()), broker)
    worker = Worker(broker, engine)
    working = asyncio.create_task(worker.run())
    yield Door(backend=backend, loaded=False)
    await worker.drain(0)
    await working


async def test_every_choice_validates_and_is_what_it_would_be_alone(door: Door) -> None:
    asked = {"response_format": FORM, "max_tokens": 200, "seed": 5}
    answer = (await door.generate(n=3, **asked)).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    alone = (await door.generate(**asked)).json()
    assert alone["choices"][0]["text"] == answer["choices"][0]["text"]


async def test_held_to_a_grammar_or_free_side_by_side(door: Door) -> None:
    bodies: list[dict[str, Any]] = [
        {"max_tokens": 30, "seed": 1},
        {"regex": "(mill|race){3}", "seed": 2},
        {"grammar": 'start: "(" start? ")"', "seed": 3, "max_tokens": 60},
    ]
    alone = [(await door.generate(**body)).json()["choices"] for body in bodies]
    together = await asyncio.gather(*(door.generate(**body) for body in bodies * 2))
    assert [response.json()["choices"] for response in together] == alone * 2
    assert re.fullmatch("(mill|race){3}", alone[1][0]["text"])
    assert alone[0][0]["finish_reason"] == "length" and alone[1][0]["finish_reason"] == "stop"


async def test_a_stream_adds_up_to_the_whole_answer(door: Door) -> None:
    body = {"response_format": {"type": "json_object"}, "seed": 9, "max_tokens": 50, "logprobs": 2}
    whole = (await door.generate(**body)).json()["choices"][0]
    events = await door.stream(**body)
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
