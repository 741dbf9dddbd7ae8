"""The door in OpenAI's words: ways to ask, and a model's tokenizer with a chat template over bytes."""

import json
from typing import Any

import httpx

from model.tokenizer import Tokenizer
from service.http.backend import Backend
from tests.service.helpers_http import SERVED, Door, FakeBroker, Script, byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{{ tools | length if tools }}"
CHATTING = Tokenizer(byte_tokenizer()._backend, {}, TEMPLATE)
HI = [{"role": "user", "content": "hi"}]


class OpenAIDoor(Door):
    """A door whose model has a chat template."""

    def __init__(self, script: Script | None = None, max_model_len: int = 64, broker: FakeBroker | None = None) -> None:
        super().__init__(script, loaded=False, broker=broker, backend=Backend())
        served = SERVED.__class__(
            SERVED.name, CHATTING, max_model_len, 256, SERVED.eos_ids, SERVED.defaults, created=SERVED.created
        )
        self.backend.loaded(served, self.broker)

    async def chat(self, messages: object = HI, **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/chat/completions", json={"messages": messages, **fields})

    async def complete(self, prompt: object = "hi", **fields: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/completions", json={"prompt": prompt, **fields})


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, `[DONE]` checked and left out."""
    assert response.status_code == 200, response.text
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1
    return [json.loads(each) for each in data[:-1]]


def said(chunks: list[dict[str, Any]]) -> str:
    """The text in them."""
    deltas = [choice.get("delta", choice) for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or delta.get("text") or "" for delta in deltas)
