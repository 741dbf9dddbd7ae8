"""OpenAI's own Python client against `millrace serve` and the bundled model: a real process, every answer checked
strictly against the client's types."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, RateLimitError
from pydantic import BaseModel, Field

from tests.faults.client import until
from tests.test_serve import Served, serving

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
ASK: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
ANIMAL = {"type": "object", "properties": {"animal": {"enum": ["fox", "hen"]}}, "required": ["animal"]}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": ANIMAL}}


class Seen(BaseModel):
    """What an answer has to be."""

    count: int = Field(ge=1, le=9)
    is_red: bool


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(BUNDLED, "--max-num-seqs", "1", "--max-waiting", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url("/v1"), api_key="none", _strict_response_validation=True) as made:
        yield made


@pytest.fixture
async def hurried(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.url("/v1"), api_key="none", _strict_response_validation=True) as made:
        yield made


def test_a_chat_whole_and_streamed_says_the_same(client: OpenAI) -> None:
    fields: Any = {"model": "bundled", "messages": ASK, "seed": 4, "max_tokens": 20}
    whole = client.chat.completions.create(**fields, stream=False)
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and choice.message.role == "assistant" and choice.message.content
    assert whole.usage and whole.usage.completion_tokens == 20
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == "length"


def test_the_streaming_helper_puts_the_answer_together(client: OpenAI) -> None:
    with client.chat.completions.stream(model="bundled", messages=ASK, max_tokens=300, stop=".", n=1) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content


def test_log_probabilities_of_both_routes_are_in_their_types(client: OpenAI) -> None:
    told = client.chat.completions.create(
        model="bundled",
        messages=ASK,
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert told.choices[0].logprobs and told.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in told.choices[0].logprobs.content] == [2, 2, 2]
    text = client.completions.create(model="bundled", prompt="Once", max_tokens=3, logprobs=2)
    assert text.choices[0].logprobs and "".join(text.choices[0].logprobs.tokens or []) == text.choices[0].text


def test_completions_of_several_prompts_whole_and_streamed(client: OpenAI, served: Served) -> None:
    told = client.completions.create(model="bundled", prompt=["Once upon", "The fox"], max_tokens=4, n=2, seed=1)
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    # The strict types know no chunk of a completion that has not ended: OpenAI's own would not pass either.
    with OpenAI(base_url=served.url("/v1"), api_key="none") as lenient:
        chunks = list(lenient.completions.create(model="bundled", prompt="The fox", max_tokens=4, seed=1, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_tools_and_their_answers_are_taken(client: OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        *ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "a den"},
    ]
    told = client.chat.completions.create(model="bundled", messages=turns, tools=[TOOL], max_tokens=5)
    assert told.choices[0].message.content


def test_an_answer_that_must_be_an_object_is_parsed_and_a_call_that_must_be_made_is_made(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model="bundled", messages=ASK, response_format=Seen, seed=1)
    seen = parsed.choices[0].message.parsed
    assert seen and 1 <= seen.count <= 9
    told = client.chat.completions.create(model="bundled", messages=ASK, tools=[TOOL], tool_choice="required", seed=1)
    assert told.choices[0].finish_reason == "tool_calls" and told.choices[0].message.tool_calls
    call = told.choices[0].message.tool_calls[0]
    assert call.type == "function" and json.loads(call.function.arguments)["animal"] in ("fox", "hen")


def test_a_response_whole_streamed_and_read_again(client: OpenAI) -> None:
    whole = client.responses.create(model="bundled", input="Tell me a story.", max_output_tokens=9)
    assert (whole.status, whole.output_text) == ("incomplete", client.responses.retrieve(whole.id).output_text)
    events = list(client.responses.create(model="bundled", input="Tell me.", max_output_tokens=9, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")


def test_models_are_listed_and_found(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "bundled" and client.models.retrieve("bundled") == listed


def test_errors_are_raised_as_what_they_are(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.models.retrieve("no/such")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as bad:
        client.chat.completions.create(model="bundled", messages=ASK, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model="bundled", prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    assert isinstance(long.value.body, dict) and (long.value.body["n_prompt_tokens"], long.value.body["n_ctx"]) == (
        2000,
        1024,
    )
    with pytest.raises(APIStatusError) as late:
        client.with_options(timeout=30).completions.create(
            model="bundled", prompt="x", max_tokens=900, extra_body={"timeout_s": 0.05, "ignore_eos": True}
        )
    assert (late.value.status_code, late.value.code) == (504, "timeout")


async def test_a_full_queue_is_tried_again_until_there_is_room(served: Served, hurried: AsyncOpenAI) -> None:
    def num_refused() -> float:
        return served.metrics().get('millrace_requests_refused_total{reason="overloaded"}', 0)

    fields: Any = {"model": "bundled", "prompt": "Once", "extra_body": {"ignore_eos": True}}
    async with AsyncExitStack() as stack:
        hasty = hurried.with_options(max_retries=0).completions.with_streaming_response
        with pytest.raises(RateLimitError) as full:
            while True:
                await stack.enter_async_context(hasty.create(**fields, max_tokens=900, stream=True))
        assert (full.value.code, full.value.response.headers["retry-after"].isdigit()) == ("overloaded", True)
        patient = hurried.with_options(max_retries=5).completions.create(**fields, max_tokens=2)
        third = asyncio.create_task(patient)
        await until(lambda: num_refused() > 1 or third.done(), "it is refused as well")
    assert (await third).usage


def test_a_conversation_that_goes_on_computes_only_what_is_new(client: OpenAI) -> None:
    said = "Once upon a time there was a little old woman who lived at the edge of the forest. " * 3
    fields: Any = {"model": "bundled", "seed": 4, "max_tokens": 4}
    found: list[int | None] = []
    for salt in ("one", "one", "other"):
        prompt = f"{said}{len(found)}"
        answer = client.completions.create(**fields, prompt=prompt, extra_body={"cache_salt": salt})
        assert answer.usage and answer.usage.prompt_tokens_details
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert found[0] == found[2] == 0 and found[1] and found[1] >= 32


def test_embeddings_of_texts_and_ids_in_both_encodings(client: OpenAI, served: Served) -> None:
    texts = ["Once upon a time there was a fox.", "The stars are far away.", "Once upon a time there was a fox."]
    # The strict types know no base64, which the client asks for by itself: OpenAI's own would not pass either.
    with OpenAI(base_url=served.url("/v1"), api_key="none") as lenient:
        told = lenient.embeddings.create(model="bundled", input=texts)
    vectors = [item.embedding for item in told.data]
    assert [item.index for item in told.data] == [0, 1, 2] and vectors[0] == vectors[2] != vectors[1]
    assert all(abs(sum(number * number for number in vector) - 1) < 1e-5 for vector in vectors)
    plain = client.embeddings.create(
        model="bundled", input=texts[1], encoding_format="float", dimensions=len(vectors[1])
    )
    assert plain.data[0].embedding == vectors[1] and plain.usage.total_tokens == plain.usage.prompt_tokens > 3
    of_ids = client.embeddings.create(model="bundled", input=[[5, 6, 7], [8]], encoding_format="float")
    assert len(of_ids.data) == 2 and of_ids.usage.prompt_tokens == 4
    with pytest.raises(BadRequestError, match="dimensions"):
        client.embeddings.create(model="bundled", input="a", dimensions=8)
