"""Reading a stored request again: the same bytes from any position in any process, whole answers, cancelling."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.request import Finish, FinishReason, Request, TokenLogprob
from service.broker.base import Entry, Timings
from service.http.generation import TOKENS_PER_PART
from tests.service.helpers_http import (
    LENGTH,
    SERVED,
    TIMINGS,
    TOKENIZER,
    Door,
    FakeBroker,
    Script,
    Visitor,
    events_of,
    frames_of,
    hang,
    say,
)

TIMEOUT = Finish(FinishReason.TIMEOUT, stop_reason="timeout_s")


def cut_by(*sizes: int, text: str, end: Finish = LENGTH, logprobs: bool = False) -> Script:
    """A text in entries of these sizes, the rest in one; the end comes by itself if nothing is left for it."""
    ids = tuple(TOKENIZER.encode(text))
    told = tuple(TokenLogprob(-0.1 * i, ((i, -0.1 * i), (65, float("-inf")))) for i in range(len(ids)))
    marks = [0]
    for size in sizes:
        marks.append(min(marks[-1] + size, len(ids)))
    entries = [
        Entry(begin, ids[begin:stop], told[begin:stop] if logprobs else ())
        for begin, stop in pairwise(marks)
        if stop > begin
    ]
    rest = told[marks[-1] :] if logprobs else ()
    return lambda request: [*entries, Entry(marks[-1], ids[marks[-1] :], rest, end, TIMINGS)]


KINDS: dict[str, tuple[str, Finish, dict[str, Any]]] = {
    "plain": ("hello", LENGTH, {}),
    "echo": ("hello", LENGTH, {"echo": True}),
    "a character of several tokens": ("h\u00e9l\u20aco", LENGTH, {}),
    "a stop string": ("ab END", Finish(FinishReason.STOP, "END"), {"stop": "END"}),
    "held back": ("ab EN", TIMEOUT, {"stop": "END"}),
    "log-probabilities": ("abc", LENGTH, {"logprobs": 2, "echo": True}),
    "nothing": ("", TIMEOUT, {"echo": True}),
    "a failure": ("ab", Finish(FinishReason.ERROR, error="the engine failed"), {}),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
async def test_every_position_gives_the_rest_of_the_same_bytes(kind: str, data: st.DataObject) -> None:
    text, end, fields = KINDS[kind]
    sizes = st.lists(st.integers(1, 4), max_size=8)
    first = Door(cut_by(*[1] * 9, text=text, end=end, logprobs="logprobs" in fields))
    original = frames_of((await first.generate(stream=True, **fields)).text)
    other = Door(broker=first.broker)  # another process, and entries of other lengths
    first.broker.script = cut_by(*data.draw(sizes), text=text, end=end, logprobs="logprobs" in fields)
    for after in range(len(original) - 1):
        assert frames_of((await other.read(str(after))).text) == original[after:]
    assert frames_of((await other.read()).text) == original
    assert other.books() == {"accepted": 0, "in_flight": 0}


@pytest.mark.parametrize("fields", [{}, {"echo": True, "stop": "lo!", "logprobs": 1}])
async def test_of_several_choices_each_gives_the_same_bytes(fields: dict[str, Any]) -> None:
    door = Door(cut_by(1, 1, 1, 1, 1, text="hello", logprobs="logprobs" in fields))
    original = events_of((await door.generate(stream=True, n=2, **fields)).text)
    for first in range(6):
        for second in range(6):
            resumed = events_of((await door.read(f"{first},{second}")).text)
            assert resumed[-1] == original[-1]
            for choice, after in ((0, first), (1, second)):
                assert data_of(resumed, choice) == data_of(original, choice)[after:]


def data_of(events: list[dict[str, Any]], choice: int) -> list[dict[str, Any]]:
    """The token events of one choice, without their ids, which tell of the other's progress too."""
    mine = [event for event in events[:-1] if event["choices"][0]["index"] == choice]
    return [{key: value for key, value in event.items() if key != "event_id"} for event in mine]


async def test_event_ids_go_on_from_what_the_client_has() -> None:
    door = Door(say("abcd"))
    await door.generate(n=2)
    events = events_of((await door.read("3,2")).text)
    assert [event["event_id"] for event in events][-1] == "4,4"
    for event in events:  # even while the other choice is still being read up to where the client is
        first, second = map(int, event["event_id"].split(","))
        assert (first >= 3, second >= 2) == (True, True)


async def test_one_count_goes_for_every_choice() -> None:
    door = Door(say("abc"))
    await door.generate(n=3)
    events = events_of((await door.read("2")).text)
    assert len(events) == 4
    assert sorted(event["event_id"] for event in events[:-1])[-1] == events[-1]["event_id"] == "3,3,3"


async def test_the_header_goes_before_the_parameter() -> None:
    door = Door(say("abc"))
    id = (await door.generate()).json()["id"]
    response = await door.read("0", **{"Last-Event-ID": f"{id}:2"})
    assert [event["event_id"] for event in events_of(response.text)] == ["3", "3"]


@pytest.mark.parametrize(
    "counts", ["", "x", "-1", "1.0", "01", " 1", "1,", ",1", "1,2,3", "2147483648", "9" * 5000, "1;2", "\u0661"]
)
async def test_a_position_that_is_none_is_named(counts: str) -> None:
    door = Door()
    id = (await door.generate(n=2)).json()["id"]
    answers = [("after", await door.read(counts))]
    if counts.isascii():
        answers.append(("Last-Event-ID", await door.read(**{"Last-Event-ID": f"{id}:{counts}"})))
    for field, response in answers:
        assert response.status_code == 422
        assert [error["field"] for error in response.json()["errors"]] == [field]


@pytest.mark.parametrize("event_id", ["{id}", "1", "other:1", "{id}.0:1", ":1", ""])
async def test_an_event_id_of_another_request_is_refused(event_id: str) -> None:
    door = Door()
    id = (await door.generate()).json()["id"]
    response = await door.read(**{"Last-Event-ID": event_id.format(id=id)})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


async def test_the_largest_position_gives_the_end_only_with_the_true_counts() -> None:
    door = Door(say("abc"))
    await door.generate()
    (last,) = events_of((await door.read(str(2**31 - 1))).text)
    assert (last["event_id"], last["usage"]["completion_tokens"]) == ("3", 3)


@pytest.mark.parametrize("how", [{"params": {"stream": "false"}}, {"headers": {"Accept": "application/json"}}])
@pytest.mark.parametrize("fields", [{}, {"n": 3, "logprobs": 0}, {"stop": "ox"}])
async def test_the_whole_answer_can_be_had_again(how: dict[str, Any], fields: dict[str, Any]) -> None:
    door = Door(say("hello"))
    first = await door.generate(**fields)
    again = await door.ask("GET", f"/generate/{first.json()['id']}", **how)
    assert (again.status_code, again.headers["content-type"]) == (200, "application/json")
    assert again.content == first.content


@pytest.mark.parametrize(
    ("params", "accept", "streams"),
    [
        ({}, "*/*", True),
        ({}, "text/event-stream", True),
        ({}, "application/json, text/event-stream", True),
        ({"stream": "true"}, "application/json", True),
        ({"stream": "false"}, "text/event-stream", False),
    ],
)
async def test_the_form_is_as_asked_for(params: dict[str, str], accept: str, streams: bool) -> None:
    door = Door()
    id = (await door.generate()).json()["id"]
    response = await door.ask("GET", f"/generate/{id}", params=params, headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream" if streams else "application/json")


@pytest.mark.parametrize(
    ("params", "headers", "field"),
    [
        ({"stream": "yes"}, {}, "stream"),
        ({"stream": ""}, {}, "stream"),
        ({"stream": "false", "after": "1"}, {}, "after"),
        ({"stream": "false"}, {"Last-Event-ID": "x:1"}, "Last-Event-ID"),
    ],
)
async def test_what_can_not_be_honoured_is_refused(params: dict[str, str], headers: dict[str, str], field: str) -> None:
    door = Door()
    id = (await door.generate()).json()["id"]
    response = await door.ask("GET", f"/generate/{id}", params=params, headers=headers)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, field)


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
async def test_what_is_not_there_is_not_found(method: str) -> None:
    door = Door()
    await door.generate()
    mine = door.broker.requests[0]
    door.broker.requests += [replace(mine, id="theirs", tenant="other"), replace(mine, id="odd", model="other")]
    for id in ("nowhere", "theirs", *(("odd",) if method != "DELETE" else ())):
        response = await door.ask(method, f"/generate/{id}")
        assert response.status_code == 404
        assert method == "HEAD" or response.json()["code"] == "request_not_found"
    assert door.broker.cancelled == []


async def test_it_can_be_read_while_it_runs_by_several_at_once_and_leaving_ends_nothing() -> None:
    door = Door(hang(*[Entry(i, (65,)) for i in range(3)]))
    writer = Visitor(door.app, stream=True)
    writing = asyncio.create_task(writer.visit())
    await door.broker.waiting.wait()
    readers = [Visitor(door.app, id=door.broker.requests[0].id, query=query) for query in (b"", b"after=1")]
    readings = []
    for reader in readers:
        door.broker.waiting.clear()
        readings.append(asyncio.create_task(reader.visit()))
        await door.broker.waiting.wait()
    for reader, reading in zip(readers, readings, strict=True):
        reader.leave()
        await reading
    frames = frames_of(writer.text)
    assert [frames_of(reader.text) for reader in readers] == [frames, frames[1:]]
    assert (door.broker.cancelled, door.num_resumed()) == ([], 2)
    writer.leave()
    await writing
    assert len(door.broker.cancelled) == 1


async def test_a_reader_of_the_whole_that_leaves_ends_nothing() -> None:
    door = Door(hang())
    door.broker.requests += await submitted_elsewhere()
    reader = Visitor(door.app, id="gen-1", query=b"stream=false")
    reading = asyncio.create_task(reader.visit())
    await door.broker.waiting.wait()
    reader.leave()
    await reading
    assert (door.broker.cancelled, reader.sent[0]["status"]) == ([], 499)


async def submitted_elsewhere() -> list[Request]:
    """A request of another process."""
    elsewhere = Door()
    await elsewhere.generate()
    return [replace(elsewhere.broker.requests[0], id="gen-1")]


async def test_head_answers_at_once_and_reads_nothing() -> None:
    door = Door(hang())
    door.broker.requests += await submitted_elsewhere()
    for query, kind in ((b"", "text/event-stream"), (b"?stream=false", "application/json")):
        response = await asyncio.wait_for(door.ask("HEAD", f"/generate/gen-1{query.decode()}"), timeout=10)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-type"].startswith(kind)
    assert (door.broker.waiting.is_set(), door.num_resumed()) == (False, 0)


@pytest.mark.parametrize("n", [1, 3])
async def test_delete_cancels_every_choice(n: int) -> None:
    door = Door()
    id = (await door.generate(n=n)).json()["id"]
    response = await Door(broker=door.broker).ask("DELETE", f"/generate/{id}")
    assert (response.status_code, response.json()) == (202, {"id": id, "status": "cancelling"})
    assert door.broker.cancelled == [request.id for request in door.broker.requests]


async def test_times_are_the_brokers_of_several_the_earliest_and_the_latest_end() -> None:
    told = {"0": Timings(0.5, 1.0, 4.0), "1": Timings(None, None, 2.0), "2": Timings(0.25, 1.5, 3.0)}
    door = Door(lambda request: [Entry(0, (65,), finish=LENGTH, timings=told[request.id[-1]])])
    assert (await door.generate(n=3)).json()["timings"] == {"queue_s": 0.25, "ttft_s": 1.0, "total_s": 4.0}


async def test_a_failure_here_has_no_times() -> None:
    *_, last = await Door(lambda request: [RuntimeError("lost")]).stream()
    assert last["timings"] == {"queue_s": None, "ttft_s": None, "total_s": None}


async def test_a_long_log_in_one_entry_is_taken_in_parts() -> None:
    text = "ab" * 2 * TOKENS_PER_PART + "c"
    broker = FakeBroker(cut_by(*[1] * len(text), text=text))
    served = replace(SERVED, max_model_len=1000)
    door = Door(broker=broker)
    door.backend.loaded(served, broker)
    original = frames_of((await door.generate(stream=True, logprobs=0)).text)
    broker.script = cut_by(text=text)
    reader = Visitor(door.app, id=broker.requests[0].id, query=b"after=3")
    await reader.visit()
    assert frames_of(reader.text) == original[3:]
    writes = [message["body"].count(b"data: ") for message in reader.sent if message.get("body")]
    assert max(writes) <= TOKENS_PER_PART
    assert writes[0] == TOKENS_PER_PART - 3
