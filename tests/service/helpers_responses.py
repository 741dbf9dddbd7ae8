"""The door in the words of OpenAI's Responses: ways to ask, and what came of it."""

import json
from typing import Any

import httpx

from tests.service.helpers_openai import OpenAIDoor


class ResponsesDoor(OpenAIDoor):
    async def respond(self, input: object = "hi", **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/responses", json={"input": input, **fields})

    async def retrieve(self, id: str, **params: Any) -> httpx.Response:
        return await self.ask("GET", f"/v1/responses/{id}", params=params)

    async def cancel(self, id: str) -> httpx.Response:
        return await self.ask("POST", f"/v1/responses/{id}/cancel")

    async def events(self, input: object = "hi", **fields: Any) -> list[dict[str, Any]]:
        return events_of(await self.respond(input, stream=True, **fields))


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream: each named as its data is, numbered without a gap, the last one terminal."""
    assert response.status_code == 200, response.text
    names, events = [], []
    for line in response.text.split("\n"):
        if line.startswith("event: "):
            names.append(line.removeprefix("event: "))
        elif line.startswith("data: "):
            events.append(json.loads(line.removeprefix("data: ")))
    assert names == [event["type"] for event in events]
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    ends = ("response.completed", "response.incomplete", "response.failed")
    assert [event["type"] in ends for event in events] == [False] * (len(events) - 1) + [True]
    return events


def told(events: list[dict[str, Any]]) -> str:
    """The text in them."""
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def text_of(response: dict[str, Any]) -> str:
    """The text of a response's messages."""
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])
