"""`/tokenize`, `/detokenize` and `/apply-template` over a byte tokenizer."""

from typing import Any

import pytest

from tests.service.helpers_http import TOKENIZER, Door
from tests.service.helpers_openai import HI, OpenAIDoor


@pytest.mark.parametrize("field", ["prompt", "content"])
async def test_a_text_is_tokenised_as_a_prompt_would_be(field: str) -> None:
    answer = await Door().ask("POST", "/tokenize", json={field: "hi", "return_token_strs": True, "model": "tiny"})
    ids = TOKENIZER.encode("hi")
    assert answer.json() == {"count": 2, "max_model_len": 64, "tokens": ids, "token_strs": ["h", "i"]}


async def test_a_conversation_goes_through_the_template() -> None:
    door, tools = OpenAIDoor(), [{"type": "function", "function": {"name": "f"}}]
    written = (await door.ask("POST", "/apply-template", json={"messages": HI, "tools": tools})).json()
    assert written == {"prompt": "u:hi|1", "content": "u:hi|1"}
    counted = (await door.ask("POST", "/tokenize", json={"messages": HI, "tools": tools})).json()
    assert counted["tokens"] == TOKENIZER.encode("u:hi|1") and "token_strs" not in counted


async def test_tokens_are_text_again() -> None:
    answer = (await Door().ask("POST", "/detokenize", json={"tokens": TOKENIZER.encode("hé")})).json()
    assert answer == {"prompt": "hé", "content": "hé"}
    assert (await Door().ask("POST", "/detokenize", json={"tokens": []})).json()["prompt"] == ""


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "model_": "x"}, "model_"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: dict[str, Any], field: str) -> None:
    response = await Door().ask("POST", path, json=body)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, field)


async def test_a_model_without_a_template_says_so() -> None:
    response = await Door().ask("POST", "/apply-template", json={"messages": HI})
    assert response.status_code == 422 and "no chat template" in response.text
    assert (await Door().ask("POST", "/detokenize", json={"tokens": [], "model": "x"})).status_code == 404


async def test_before_the_model_is_loaded_there_is_nothing_to_ask() -> None:
    assert (await Door(loaded=False).ask("POST", "/tokenize", json={"prompt": "a"})).status_code == 503
