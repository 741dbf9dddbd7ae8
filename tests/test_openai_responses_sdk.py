"""OpenAI's own Python client and its Responses, against `millrace serve` and the bundled model: a real process, every
answer checked strictly against the client's types."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent

from tests.test_serve import Served, serving

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
ASK = "Tell me a story about a fox."
TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
FIELDS: Any = {"model": "bundled", "input": ASK, "extra_body": {"seed": 4}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(BUNDLED, "--max-num-seqs", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url("/v1"), api_key="none", _strict_response_validation=True) as made:
        yield made


def ended(client: OpenAI, id: str) -> Response:
    """It, once it has: its events are read to the end."""
    for event in client.responses.retrieve(id, stream=True):
        if event.type in ("response.completed", "response.incomplete", "response.failed"):
            return event.response
    raise AssertionError("a stream without an end")


def test_whole_streamed_and_read_again_say_the_same(client: OpenAI) -> None:
    whole = client.responses.create(**FIELDS, max_output_tokens=20, metadata={"a": "b"}, tools=[TOOL])
    assert (whole.status, whole.metadata) == ("incomplete", {"a": "b"}) and whole.output_text
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.output_tokens == 20
    events = list(client.responses.create(**FIELDS, max_output_tokens=20, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert client.responses.retrieve(whole.id) == whole


def test_the_streaming_helper_puts_the_response_together(client: OpenAI) -> None:
    with client.responses.stream(model="bundled", input=ASK, extra_body={"stop": "."}) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert answer.status == "completed" and answer.output_text


def test_a_conversation_goes_on_with_what_was_answered(client: OpenAI) -> None:
    first = client.responses.create(**FIELDS, max_output_tokens=8)
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    turns: Any = [
        {"role": "user", "content": ASK},
        *[item.model_dump(exclude_none=True) for item in first.output],
        call,
        {"type": "function_call_output", "call_id": "c", "output": "a den"},
    ]
    told = client.responses.create(model="bundled", input=turns, tools=[TOOL], max_output_tokens=4, instructions="Be.")
    assert told.usage and first.usage and told.usage.input_tokens > first.usage.input_tokens


def test_a_broken_stream_is_read_on_after_its_last_event(client: OpenAI) -> None:
    begun: list[ResponseStreamEvent] = []
    with client.responses.create(**FIELDS, max_output_tokens=30, background=True, stream=True) as stream:
        for event in stream:
            begun.append(event)
            if len(begun) == 9:
                break
    assert begun[0].type == "response.created"
    id = begun[0].response.id
    rest = list(client.responses.retrieve(id, stream=True, starting_after=begun[-1].sequence_number))
    again = list(client.responses.retrieve(id, stream=True))
    assert again == [*begun, *rest]


def test_in_the_background_it_can_be_cancelled(client: OpenAI) -> None:
    fields: Any = FIELDS | {"extra_body": {"ignore_eos": True}}
    made = [client.responses.create(**fields, max_output_tokens=900, background=True) for _ in range(2)]
    assert {response.status for response in made} == {"queued"}
    for response in reversed(made):
        assert client.responses.cancel(response.id).status == "cancelled"
    for response in made:
        assert ended(client, response.id).status == "cancelled"
        assert client.responses.retrieve(response.id).status == "cancelled"


def test_errors_are_raised_as_what_they_are(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as chained:
        client.responses.create(model="bundled", input=ASK, previous_response_id="resp_1")
    assert (chained.value.param, chained.value.type) == ("previous_response_id", "invalid_request_error")
    with pytest.raises(NotFoundError):
        client.responses.retrieve("resp_0")
