"""`millrace serve` over an encoder-decoder: the same routes, with a prompt that is answered instead of gone on with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.engine.engine import Engine
from model.request import Request, SamplingParams, begun
from tests.model.conftest import random_decoder, save_folder
from tests.model.test_sources import BYTES
from tests.test_serve import Served, serving

PROMPT = "Zwei Hunde rennen."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random network of 2017; byte 0 ends an answer."""
    return save_folder(random_decoder(BYTES), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with serving(folder, "--max-model-len", "64") as served:
        yield served


def post(server: Served, path: str = "/generate", **body: object) -> dict[str, Any]:
    answer = httpx.post(server.url(path), json={"prompt": PROMPT, "max_tokens": 12, **body}, timeout=60)
    found: dict[str, Any] = {"status": answer.status_code, **answer.json()}
    return found


def alone(folder: Path, **sampling: Any) -> str:
    """The answer of an engine that nobody else uses."""
    engine = Engine.load(folder, max_model_len=64)
    prompt_ids, source_ids = begun(tuple(engine.tokenizer.encode(PROMPT)), engine.start_id)
    params = SamplingParams(max_tokens=12, stop_token_ids=(0,), eos_ids=(0,), **sampling)
    engine.add(Request("a", prompt_ids, params, source_ids=source_ids))
    out: list[int] = []
    while engine.has_work():
        out += [i for delta in engine.step() for i in delta.token_ids]
    return engine.tokenizer.decode(out)


def test_a_prompt_is_answered(server: Served, folder: Path) -> None:
    found = post(server, temperature=0)
    assert found["choices"][0]["text"] == alone(folder, temperature=0.0)
    assert found["usage"]["prompt_tokens"] == len(PROMPT)
    assert found["usage"]["completion_tokens"] == 12


def test_answers_of_a_group_are_their_seeds(server: Served, folder: Path) -> None:
    found = post(server, n=3, seed=11, temperature=1)
    texts = [choice["text"] for choice in found["choices"]]
    assert texts[0] == alone(folder, temperature=1.0, seed=11)
    assert len(set(texts)) == 3
    assert found["usage"]["prompt_tokens"] == len(PROMPT)


def test_a_stream_has_the_same_text(server: Served) -> None:
    with httpx.stream("POST", server.url("/generate"), json={"prompt": PROMPT, "seed": 4, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    events = [httpx.Response(200, content=line[6:]).json() for line in lines]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    assert text == post(server, seed=4, max_tokens=128)["choices"][0]["text"] != ""


def test_completions_answer_too(server: Served, folder: Path) -> None:
    found = post(server, "/v1/completions", temperature=0, echo=True)
    assert found["choices"][0]["text"] == PROMPT + alone(folder, temperature=0.0)
    assert found["usage"]["prompt_tokens"] == len(PROMPT)


def test_a_source_beyond_the_limit_is_refused(server: Served) -> None:
    found = post(server, prompt="x" * 64)
    assert found["status"] == 422
    assert "63" in found["detail"]
    assert post(server, prompt="x" * 63, max_tokens=200, ignore_eos=True)["usage"]["completion_tokens"] == 63


def test_a_search_is_asked_for_by_its_width(server: Served) -> None:
    found, again = (post(server, beam_width=4)["choices"][0] for _ in range(2))
    assert found["token_ids"] == again["token_ids"]
    assert 0 < len(found["token_ids"]) <= 12
    assert post(server, beam_width=2, n=2)["detail"].startswith("beam_width")


def test_a_streamed_search_has_the_same_text(server: Served) -> None:
    body = {"prompt": PROMPT, "beam_width": 3, "max_tokens": 12, "stream": True}
    with httpx.stream("POST", server.url("/generate"), json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    events = [httpx.Response(200, content=line[6:]).json() for line in lines]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    assert text == post(server, beam_width=3)["choices"][0]["text"] != ""
