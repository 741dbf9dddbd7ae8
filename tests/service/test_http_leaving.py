"""Who may leave, and what that ends: clients of each kind, and this process itself."""

import asyncio
from typing import Any

import pytest

from service.broker.base import Entry
from service.errors import Handover
from tests.service.helpers_http import Door, FakeBroker, Visitor, frames_of, hang, say

HANDED_OVER = {"accepted": 1, "in_flight": 0, "handed_over": 1}


async def leave(door: Door, **fields: Any) -> Visitor:
    """A client that leaves once there is nothing more to read."""
    visitor = Visitor(door.app, **fields)
    visit = asyncio.create_task(visitor.visit())
    await door.broker.waiting.wait()
    visitor.leave()
    await visit
    return visitor


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_of_a_resumable_request_may_leave(stream: bool) -> None:
    door = Door(hang(Entry(0, (65,))))
    await leave(door, stream=stream, resumable=True)
    assert door.broker.cancelled == []
    assert door.books() == HANDED_OVER


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_of_any_other_may_not(stream: bool) -> None:
    door = Door(hang(Entry(0, (65,))))
    await leave(door, stream=stream)
    assert len(door.broker.cancelled) == 1
    assert door.books() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


@pytest.mark.parametrize("n", [1, 2])
async def test_in_the_background_the_answer_is_where_to_find_it(n: int) -> None:
    door = Door(hang())
    response = await door.generate(background=True, n=n, seed=5)
    told, (request, *_) = response.json(), door.broker.requests
    url = f"/generate/{request.group}"
    assert (response.status_code, response.headers["location"]) == (202, url)
    about = {"model": "tiny", "created": int(request.created_s), "seed": 5}
    assert told == {"id": request.group, "url": url} | about
    assert (door.broker.cancelled, door.broker.waiting.is_set()) == ([], False)
    assert door.books() == {"accepted": n, "in_flight": 0, "handed_over": n}


async def test_what_runs_in_the_background_can_be_read() -> None:
    door = Door(say("hello"))
    url = (await door.generate(background=True)).json()["url"]
    frames = frames_of((await door.ask("GET", url)).text)
    assert len(frames) == 7
    assert (await door.ask("GET", url, params={"stream": "false"})).json()["choices"][0]["text"] == "hello"


async def test_a_stream_says_where_it_can_be_read_before_its_first_event() -> None:
    door = Door(hang())
    visitor = await leave(door, stream=True, resumable=True)
    assert (b"content-location", f"/generate/{door.broker.requests[0].id}".encode()) in visitor.sent[0]["headers"]


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("fields", [{}, {"n": 2}])
async def test_a_stream_that_goes_on_elsewhere_just_ends(num_tokens: int, fields: dict[str, Any]) -> None:
    door = Door(lambda request: [*[Entry(i, (65,)) for i in range(num_tokens)], Handover()])
    visitor = Visitor(door.app, stream=True, **fields)
    await visitor.visit()
    assert visitor.text.endswith("\n\n: this server stops; read on with the last event id\nretry: 200\n\n"[2:])
    assert "[DONE]" not in visitor.text
    assert '"finish_reason":"' not in visitor.text
    assert visitor.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    n = fields.get("n", 1)
    assert (door.broker.cancelled, door.books()) == ([], {"accepted": n, "in_flight": 0, "handed_over": n})


async def test_what_came_before_a_handover_and_after_it_is_the_whole_stream() -> None:
    broker = FakeBroker(say("hello"))
    whole = await Door(broker=broker).generate(stream=True)
    url, frames = f"/generate/{broker.requests[0].id}", frames_of(whole.text)
    broker.script = lambda request: [*list(say("hello")(request))[:2], Handover()]
    before = frames_of((await Door(broker=broker).ask("GET", url)).text.partition(": this server")[0])
    broker.script = say("hello")
    last_id = before[-1].partition("\n")[0].removeprefix("id: ")
    after = await Door(broker=broker).ask("GET", url, headers={"Last-Event-ID": last_id})
    assert before + frames_of(after.text) == frames


async def test_a_whole_answer_that_goes_on_elsewhere_says_where() -> None:
    door = Door(lambda request: [Entry(0, (65,)), Handover()])
    response = await door.generate()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert door.broker.requests[0].id in response.json()["detail"]
    assert (door.broker.cancelled, door.books()) == ([], HANDED_OVER)


async def test_a_refusal_for_the_same_reason_says_when_to_come_back() -> None:
    door = Door()
    door.broker.refusal = Handover()
    response = await door.generate()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_cuts_its_clients_off_cancels_nothing(stream: bool) -> None:
    door = Door(hang(Entry(0, (65,))))
    visit = asyncio.create_task(Visitor(door.app, stream=stream).visit())
    await door.broker.waiting.wait()
    visit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visit
    assert (door.broker.cancelled, door.books()) == ([], HANDED_OVER)


async def test_a_resumable_request_that_breaks_here_is_left_to_others() -> None:
    door = Door(lambda request: [Entry(0, (65,)), RuntimeError("a bug")])
    *_, last = await door.stream(resumable=True)
    assert last["choices"][0]["finish_reason"] == "error"
    assert (door.broker.cancelled, door.books()) == ([], {"accepted": 1, "in_flight": 0, "error": 1})
