"""Streams: frames, event ids, the one terminal event, and readers that go."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from sse_starlette.sse import AppStatus

from model.request import Finish, FinishReason
from service.broker.base import Entry
from service.errors import Unavailable
from tests.service.helpers_http import LENGTH, STOP, TOKENIZER, Door, Visitor, events_of, hang, say


async def test_one_event_for_each_token_then_the_terminal_one() -> None:
    *deltas, last = await Door(say("hello")).stream(seed=3)
    assert [(d["event_id"], d["choices"][0]["text"]) for d in deltas] == list(zip("12345", "hello", strict=True))
    assert [d["choices"][0]["finish_reason"] for d in deltas] == [None] * 5
    assert all(d["seed"] == 3 and "usage" not in d for d in deltas)
    assert (last["event_id"], last["choices"][0]["text"], last["choices"][0]["token_ids"]) == ("5", "", [])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 5
    assert last["timings"]["queue_s"] == 0.25


async def test_headers_keep_proxies_from_holding_events_back() -> None:
    response = await Door().generate(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-store"
    assert "\r" not in response.text


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"n": 3}, {"stop": "llo!"}, {"logprobs": 1}])
async def test_the_events_add_up_to_the_whole_answer(fields: dict[str, object]) -> None:
    whole = (await Door(say("hé llo", LENGTH)).generate(**fields)).json()
    events = await Door(say("hé llo", LENGTH)).stream(**fields)
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [id for part in parts for id in part["token_ids"]] == choice["token_ids"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
    assert events[-1]["usage"] == whole["usage"]
    assert list(events[-1]) == [*whole, "event_id"]


async def test_several_choices_count_their_tokens_apart_and_end_together() -> None:
    *deltas, last = await Door(say("abc")).stream(n=2)
    assert sorted(d["event_id"] for d in deltas)[-1] == "3,3"
    assert all(sum(map(int, d["event_id"].split(","))) == i + 1 for i, d in enumerate(deltas))
    assert [choice["finish_reason"] for choice in last["choices"]] == ["stop", "stop"]


async def test_tokens_that_are_due_together_share_one_write() -> None:
    door = Door(lambda request: [Entry(0, tuple(TOKENIZER.encode("abc")), finish=STOP)])
    visitor = Visitor(door.app, stream=True)
    await visitor.visit()
    writes = [m["body"] for m in visitor.sent if m.get("body")]
    assert [write.count(b"data: ") for write in writes] == [3, 2]  # the second: terminal event and [DONE]
    assert len(events_of(b"".join(writes).decode())) == 4


async def test_text_held_back_until_the_end_is_in_the_terminal_event() -> None:
    a, newline = TOKENIZER.encode("a\n")
    script = [Entry(0, (a, newline)), Entry(2, finish=Finish(FinishReason.TIMEOUT))]
    events = await Door(lambda request: script).stream(stop="\n\n", echo=True)
    assert [e["choices"][0]["text"] for e in events] == ["hia", "", "\n"]
    assert [e["choices"][0]["token_ids"] for e in events] == [[a], [newline], []]
    assert [e["event_id"] for e in events] == ["1", "2", "2"]
    assert events[-1]["choices"][0]["finish_reason"] == "timeout"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (RuntimeError("a secret path"), "internal error"),
        (Unavailable("the queue can't be reached"), "the queue can't be reached"),
        (Entry(1, finish=Finish(FinishReason.ERROR, error="the engine failed")), "the engine failed"),
        (Entry(5, (65,)), "internal error"),  # a gap
    ],
)
async def test_whatever_breaks_there_is_one_terminal_event(broken: Entry | Exception, told: str) -> None:
    door = Door(lambda request: [Entry(0, (65,)), broken])
    first, last = await door.stream()
    assert first["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "error"
    assert (last["error"]["status"], last["error"]["detail"]) == (500, told)
    assert door.books() == {"accepted": 1, "in_flight": 0, "error": 1}
    ended_there = isinstance(broken, Entry) and broken.finish is not None
    assert len(door.broker.cancelled) == (0 if ended_there else 1)


async def test_a_log_that_just_stops_is_an_error_too() -> None:
    *_, last = await Door(lambda request: [Entry(0, (65,))]).stream(n=2)
    assert [choice["finish_reason"] for choice in last["choices"]] == ["error", "error"]


@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_a_reader_that_leaves_frees_every_choice(num_tokens: int) -> None:
    door = Door(hang(*[Entry(i, (65,)) for i in range(num_tokens)]))
    visitor = Visitor(door.app, n=2, stream=True)
    visit = asyncio.create_task(visitor.visit())
    await door.broker.waiting.wait()
    visitor.leave()
    await visit
    assert door.broker.cancelled == [request.id for request in door.broker.requests]
    assert door.books() == {"accepted": 2, "in_flight": 0, "cancelled": 2}


async def test_a_reader_that_left_before_the_first_byte_is_noticed_too() -> None:
    door = Door(hang())
    visitor = Visitor(door.app, stream=True)
    visitor.leave()
    await visitor.visit()
    assert len(door.broker.cancelled) == 1
    assert door.books() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


async def test_a_long_replay_lets_the_departure_be_noticed() -> None:
    door = Door(lambda request: (Entry(i, (65,)) for i in range(10_000)))
    visitor = Visitor(door.app, stream=True)
    visitor.leave_after = 5
    await visitor.visit()
    assert len(visitor.sent) < 100
    assert len(door.broker.cancelled) == 1


@pytest.mark.parametrize("num_messages", range(1, 9))
async def test_a_client_may_leave_between_any_two_messages(
    num_messages: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.http.sse.PING_S", 0)
    door = Door(say("hello"))
    visitor = Visitor(door.app, stream=True)
    visitor.leave_after = num_messages
    await visitor.visit()
    assert sum(door.books().values()) == 2  # accepted, and ended in one way
    assert not caplog.records


async def test_who_waits_hears_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.sse.PING_S", 0.001)
    door = Door(hang())
    visitor = Visitor(door.app, stream=True)
    visitor.leave_after = 4
    await visitor.visit()
    assert visitor.text.startswith(": waiting\n" * 3)
    assert door.books() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


async def test_a_client_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.sse.STUCK_S", 0.01)
    monkeypatch.setattr("service.http.sse.PING_S", 0.01)
    door = Door(hang(Entry(0, (65,))))
    visitor = Visitor(door.app, stream=True)

    async def stuck(message: dict[str, object]) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    monkeypatch.setattr(visitor, "_send", stuck)
    await visitor.visit()
    assert len(door.broker.cancelled) == 1
    assert door.books() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


class Server(uvicorn.Server):
    """A real server on a loopback port, which says when it is up."""

    def __init__(self, door: Door) -> None:
        super().__init__(uvicorn.Config(door.app, lifespan="off", ws="none", log_config=None))
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@asynccontextmanager
async def serving(door: Door) -> AsyncIterator[tuple[Server, str]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(door)
    task = asyncio.create_task(server.serve([listener]))
    await server.up.wait()
    yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await task


async def test_sigterm_cuts_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)  # the library's flag, global to the process
    monkeypatch.setattr("service.http.sse.PING_S", 1)
    go_on = asyncio.Event()
    door = Door(say("abc"))
    follow = door.broker.follow

    async def slow(id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        async for entry in follow(id, tenant, after):
            yield entry
            await go_on.wait()

    monkeypatch.setattr(door.broker, "follow", slow)
    async with (
        serving(door) as (server, url),
        httpx.AsyncClient() as client,
        client.stream("POST", f"{url}/generate", json={"prompt": "hi", "stream": True}) as response,
    ):
        chunks = response.aiter_text()
        text = await anext(chunks)
        server.should_exit = AppStatus.should_exit = True  # what the signal's handlers do
        while ": waiting" not in text:  # twice as long as the library would have let it live
            text += await anext(chunks)
        go_on.set()
        text += "".join([chunk async for chunk in chunks])
    *_, last = events_of(text)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert door.books() == {"accepted": 1, "in_flight": 0, "stop": 1}
