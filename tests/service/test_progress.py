"""While nothing comes: how a request stands, told to those who asked, in a form that no other reader trips over."""

import asyncio
import json
from collections.abc import Iterable, Iterator

import pytest

from model.request import Finish, FinishReason
from service.broker.base import Entry, Glance
from service.errors import Unavailable
from service.http import generation, sse
from tests.service.helpers_broker import HANG_S
from tests.service.helpers_http import Door, FakeBroker, Visitor, events_of, hang, say

EMPTY, BEGUN = Entry(0), Entry(0, (65,))
ENDED = Entry(0, finish=Finish(FinishReason.CANCELLED))


class Standing(FakeBroker):
    """Each look finds the next of these; the last one stays. Sets `all_seen` at the look after it."""

    def __init__(self, *glances: Glance | Exception) -> None:
        super().__init__(hang())
        self._glances: Iterator[Glance | Exception] = iter(glances)
        self._last: Glance | Exception = Unavailable("nothing yet")
        self.looked, self.all_seen = asyncio.Event(), asyncio.Event()

    async def peek(self, id: str, tenant: str) -> Glance:
        self.num_looks += 1
        self.looked.set()
        following = next(self._glances, None)
        if following is None:
            self.all_seen.set()
        else:
            self._last = following
        if isinstance(self._last, Exception):
            raise self._last
        return self._last


@pytest.fixture(autouse=True)
def looks_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LOOK_S", 0.001)


async def told(glances: Iterable[Glance | Exception], id: str | None = None, query: bytes = b"") -> str:
    """What a stream says that hangs, until all that the broker has to show was seen."""
    door = Door(broker=(broker := Standing(*glances)))
    fields = {"prompt": "12345", "stream": True, "progress": id is None}
    if id is not None:
        await door.generate("12345", background=True)
        fields, id = {}, broker.requests[-1].id
    visitor = Visitor(door.app, id, query, **fields)
    visit = asyncio.create_task(visitor.visit())
    async with asyncio.timeout(HANG_S):
        await broker.all_seen.wait()
        visitor.leave()
        await visit
    return visitor.text


async def test_place_and_prefill_are_told_as_they_change() -> None:
    glances = [Glance(EMPTY, 3), Glance(EMPTY, 3), Glance(EMPTY, 0), Glance(EMPTY), Glance(EMPTY, None, 4)]
    lines = (await told(glances)).splitlines()
    assert all(line.startswith(": progress ") for line in lines)
    assert [json.loads(line.removeprefix(": progress ")) for line in lines] == [
        {"position": position, "computed_tokens": num_computed, "prompt_tokens": 5}
        for position, num_computed in [(3, 0), (0, 0), (None, 0), (None, 4)]
    ]


async def test_a_queue_that_is_away_for_a_while_is_asked_again() -> None:
    text = await told([Unavailable("away"), Glance(EMPTY, 1), Unavailable("away"), Glance(EMPTY, 0)])
    assert [json.loads(line.split(" ", 2)[2])["position"] for line in text.splitlines()] == [1, 0]


async def test_a_reader_who_came_back_can_ask_for_it_too() -> None:
    assert '"position":2' in await told([Glance(EMPTY, 2)], "again", b"progress=true")


async def test_who_has_not_asked_costs_no_look_and_gets_none() -> None:
    door = Door(say("abc"))
    await door.stream()
    await door.read()
    assert door.broker.num_looks == 0


@pytest.mark.parametrize("seen", [BEGUN, ENDED])
async def test_nothing_is_told_or_looked_for_once_there_is_something(seen: Entry) -> None:
    broker = Standing(Glance(seen))
    door = Door(broker=broker)
    visitor = Visitor(door.app, stream=True, progress=True)
    visit = asyncio.create_task(visitor.visit())
    async with asyncio.timeout(HANG_S):
        await broker.waiting.wait()
        await broker.looked.wait()
        visitor.leave()
        await visit
    assert (broker.num_looks, visitor.text) == (1, "")


async def test_it_stands_outside_of_the_events() -> None:
    door = Door(say("abc"))
    door.broker.position = 4
    response = await door.generate(stream=True, progress=True)
    assert [event["event_id"] for event in events_of(response.text)] == ["1", "2", "3", "3"]


async def test_a_comment_is_a_line_and_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an event with an id, the Python client of OpenAI takes an empty line for the end of an event."""
    monkeypatch.setattr(sse, "PING_S", 0.001)
    visitor = Visitor((door := Door(hang(BEGUN))).app, stream=True)
    visitor.leave_after = 6
    async with asyncio.timeout(HANG_S):
        await visitor.visit()
    comments = [line for line in visitor.text.splitlines() if line.startswith(":")]
    assert comments and ":" + visitor.text.partition("\n:")[2] == "".join(f"{line}\n" for line in comments)
    assert door.broker.cancelled


@pytest.mark.parametrize("fields", [{"progress": True}, {"progress": 1, "stream": True}])
async def test_it_is_for_streams_and_true_or_false(fields: dict[str, object]) -> None:
    response = await Door().generate(**fields)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "progress")


async def test_the_parameter_is_true_or_false() -> None:
    door = Door()
    id = (await door.generate()).json()["id"]
    response = await door.ask("GET", f"/generate/{id}", params={"progress": "maybe"})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "progress")
