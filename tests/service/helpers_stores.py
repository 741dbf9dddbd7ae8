"""The two queues as the state machine drives them, and how each is compared with the reference after a step."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgpack

from model.request import Delta as StepDelta
from model.request import Finish, FinishReason, Request, SamplingParams
from service.broker.base import IdempotencyKey, Verdict
from service.broker.memory import MemoryBroker
from service.errors import IdempotencyConflict, Overloaded, RequestNotFound
from tests.service.helpers_broker import FakeClock, Reader, token_ids
from tests.service.helpers_machine import KEEP, Ask, Asked, Code, Delta, Reference
from tests.service.helpers_redis import LEASE_MS, START_MS, Functions, Picture, entry

CODES = {Verdict.FENCED: -1, Verdict.CANCELLED: -2, Verdict.EXPIRED: -3}
Held = Sequence[tuple[str, str]]  # id, token


class Store(Protocol):
    """What both have. Replies are those of the reference."""

    lease_ms: int

    def submit(self, group: Sequence[Ask], key: tuple[str, str] | None) -> tuple[object, ...]: ...
    def claim(self, worker: str, token: str, room: int) -> list[tuple[str, list[int]]]: ...
    def commit(self, worker: str, number: int, step: Sequence[Delta]) -> list[Code]: ...
    def release(self, held: Held) -> None: ...
    def cancel(self, id: str, tenant: str) -> None: ...
    def lookup(self, group: str, tenant: str) -> list[str]: ...
    def pass_ms(self, ms: int) -> None: ...
    def check(self, reference: Reference) -> None: ...


class RedisStore:
    """The functions of the queue, and the whole of what they stored."""

    lease_ms = LEASE_MS

    def __init__(self, functions: Functions, max_waiting: int, max_tokens: int) -> None:
        self.functions, self.call, self.pass_ms = functions, functions.call, functions.pass_ms
        self._limits = max_waiting, max_tokens
        functions.reset()

    def submit(self, group: Sequence[Ask], key: tuple[str, str] | None) -> tuple[object, ...]:
        flow = _flow(group[0])
        asked = [part for ask in group for part in _asked(ask)]
        reply = self.call("submit", "q", *self._limits, *flow, KEEP, *(key or ("", "")), group[0].group, *asked)
        return tuple(part.decode() if isinstance(part, bytes) else part for part in reply)

    def restore(self, ask: Ask, ids: list[int], reader: str) -> int:
        num: int = self.call("restore", "q", *_flow(ask), KEEP, reader, *_asked(ask), len(ids), entry(0, ids))
        return num

    def claim(self, worker: str, token: str, room: int) -> list[tuple[str, list[int]]]:
        jobs = self.call("claim", worker, "q", token, room, LEASE_MS)
        assert all(payload == f"payload of {id.decode()}".encode() for id, payload, *_ in jobs)
        return [(id.decode(), [t for raw in log for t in msgpack.unpackb(raw)[2]]) for id, _, _, *log in jobs]

    def commit(self, worker: str, number: int, step: Sequence[Delta]) -> list[Code]:
        return self.functions.commit(worker, number, *step)

    def release(self, held: Held) -> None:
        self.call("release", *_flat(held))

    def abandon(self, held: Held) -> None:
        self.call("abandon", *_flat(held))

    def beat(self, worker: str, held: Held) -> list[Code]:
        codes: list[Code] = self.call("beat", worker, LEASE_MS, f"info of {worker}", *_flat(held))
        return codes

    def cancel(self, id: str, tenant: str) -> None:
        self.call("cancel", id, tenant)

    def lookup(self, group: str, tenant: str) -> list[str]:
        return [raw.decode().removeprefix("payload of ") for raw in self.call("lookup", group, tenant)]

    def check(self, reference: Reference) -> None:
        picture = self.functions.picture()
        check_invariants(picture)
        check_equal(picture, reference)


def _flow(ask: Ask) -> tuple[str, str, float]:
    return ask.tenant, "a" if ask.ahead else "b", ask.weight


def _asked(ask: Ask) -> list[object]:
    limits = ["" if ms is None else ms for ms in (ask.left, ask.queue_left, ask.orphan)]
    return [ask.id, f"payload of {ask.id}", ask.size, ask.size + ask.max_tokens, *limits, ask.num_choices]


def _flat(held: Held) -> list[str]:
    return [part for pair in held for part in pair]


# --- the invariants, which need no reference -----------------------------------------------------------------------


def check_invariants(p: Picture) -> None:
    """I1, I3, I5, I9 and I10 speak of more than one moment: the machine shows them by equality with the reference."""
    for id in p.ids():
        h = p.hashes[f"r:{id}"]
        _check_log(p.streams.get(f"o:{id}", []), int(h["n"]), ended=h["st"] == "e")
        places = sorted(name for where in (p.scores, p.sets) for name in where if id in where[name])
        queued = [f"rdy:{h['q']}:{h['cl']}", f"wait:{h['q']}"]
        own = {"w": queued, "r": [f"held:{h['wk']}"], "e": []}[h["st"]]
        found = [name for name in places if name.partition(":")[0] in ("rdy", "wait", "held")]
        assert found == own, f"I6: {id} in state {h['st']} is in {found}"
        assert "due" in places or not h["dl"] or h["st"] == "e", f"I7: {id} would never end"
    strangers = {m for where in (p.scores, p.sets) for n in where if n != "workers" for m in where[n]} - set(p.ids())
    assert not strangers, f"{strangers} are in sets without being requests"
    assert not p.kept_for_ever(), f"I11: {p.kept_for_ever()} have no expiry"
    _check_counters(p)


def _check_log(log: list[tuple[str, dict[str, bytes]]], num: int, ended: bool) -> None:
    at, terminal = 0, []
    for key, fields in log:
        _, start, ids, _, finish = msgpack.unpackb(fields["e"])
        assert start == at, f"I2: an entry begins at {start}, not {at}"
        at += len(ids)
        terminal.append(finish is not None)
        assert key == f"{at}-{1 + terminal[-1]}" and ("t" in fields) == terminal[-1], f"I2: {key} after {at} ids"
    assert at == num, f"I2: {at} ids in the log, n is {num}"
    assert sum(terminal) == ended and (not ended or terminal[-1]), f"I4: {terminal}"


def _check_counters(p: Picture) -> None:
    requests = [h for name, h in p.hashes.items() if name.startswith("r:")]
    for name, h in p.hashes.items():
        kind, _, rest = name.partition(":")
        if kind == "t":
            num_open = sum(r["tn"] == rest and r["st"] != "e" for r in requests)
            assert int(h.get("open", 0)) == num_open, f"I8: {h} of {rest}, {num_open} are open"
        elif kind == "q":
            num_tokens = sum(int(r["size"]) for r in requests if r["q"] == rest and r["st"] == "w")
            num_running = sum(r["q"] == rest and r["st"] == "r" for r in requests)
            told = int(h.get("tokens", 0)), int(h.get("running", 0))
            assert told == (num_tokens, num_running), f"{told} counted, there are {num_tokens}, {num_running}"


# --- equality with the reference -------------------------------------------------------------------------------------


def check_equal(p: Picture, reference: Reference) -> None:
    assert p.ids() == sorted(reference.asked)
    for id, r in reference.asked.items():
        told = {name: value for name, value in p.hashes[f"r:{id}"].items() if name in _fields(r)}
        assert told == _fields(r), id
        assert _log(p.streams.get(f"o:{id}", [])) == (r.log, r.end, r.timings), id
    asked = list(reference.asked.values())
    waiting, scores = reference.those("w"), p.scores
    for ahead, name in ((True, "rdy:q:a"), (False, "rdy:q:b")):
        assert scores.get(name, {}) == {r.ask.id: r.tag for r in waiting if r.ask.ahead == ahead}
    assert scores.get("wait:q", {}) == {r.ask.id: r.t0 for r in waiting}
    assert scores.get("due", {}) == {r.ask.id: r.due for r in asked if r.due is not None}
    assert scores.get("orphan", {}) == {r.ask.id: r.orphan for r in asked if r.orphan is not None}
    assert scores.get("workers", {}) == reference.leases
    assert sorted(fields["id"].decode() for _, fields in p.streams.get("dead", [])) == sorted(reference.dead)
    told_tags = {(tenant, ahead): _tag(p, tenant, ahead) for tenant, ahead in reference.finish}
    assert told_tags == reference.finish
    for ahead, name in ((True, "va"), (False, "vb")):
        assert float(p.hashes.get("q:q", {}).get(name, 0)) == reference.virtual[ahead], name
    keys = {("idem:" + ":".join(name)): {"id": k[0], "body": k[1]} for name, k in reference.keys.items()}
    assert {name: h for name, h in p.hashes.items() if name.startswith("idem:")} == keys


def _tag(p: Picture, tenant: str, ahead: bool) -> float:
    return float(p.hashes[f"t:{tenant}"]["q" + ("a" if ahead else "b")])


def _fields(r: Asked) -> dict[str, str]:
    """Those that must be there. Numbers as Redis writes them."""
    fields = {"st": r.state, "n": len(r.log), "t0": r.t0, "c": r.blame, "cn": r.crashed_at, "at": r.num_claims}
    fields |= {"dl": "" if r.deadline is None else r.deadline, "tag": f"{r.tag:.17g}", "mb": " ".join(r.readers)}
    fields |= {"qms": r.queue_ms} if r.queue_ms is not None else {}
    fields |= {"ft": r.first_ms} if r.first_ms is not None else {}
    fields |= {"lk": r.token, "wk": r.worker} if r.state != "e" else {}
    fields |= {"cx": r.doom} if r.doom and r.state == "r" else {}
    return {name: str(value) for name, value in fields.items()}


def _log(entries: list[tuple[str, dict[str, bytes]]]) -> tuple[object, ...]:
    ids, end, timings = [], None, None
    for _, fields in entries:
        _, _, new, _, finish = msgpack.unpackb(fields["e"])
        ids += new
        if finish is not None:
            end = finish[0], finish[1] or None
            timings = tuple(None if ms == b"-" else int(ms) for ms in fields["t"].split())
    return ids, end, timings


# --- the in-process one ----------------------------------------------------------------------------------------------


class MemoryStore:
    """A broker on a loop of its own, on a clock that the machine moves. Who needs no reader is read all the time."""

    lease_ms = 10**12  # there are no leases

    def __init__(self, runner: asyncio.Runner, max_waiting: int, max_tokens: int, weights: dict[str, float]) -> None:
        self._runner, self._clock = runner, FakeClock(START_MS / 1000)
        self.readers: dict[str, Reader] = {}
        self._broker = MemoryBroker(max_waiting, max_tokens, KEEP / 1000, weights, self._clock, self._clock.call_later)

    def close(self) -> None:
        for id in list(self.readers):
            self.leave(id)

    def submit(self, group: Sequence[Ask], key: tuple[str, str] | None) -> tuple[object, ...]:
        named = None if key is None else IdempotencyKey(*key)
        asked = [self._request(ask) for ask in group]
        try:
            accepted = self._runner.run(self._broker.submit(asked, named))
        except Overloaded as error:
            return "full", error.num_waiting, error.retry_after_s
        except IdempotencyConflict:
            return ("conflict",)
        if not accepted.created:
            return "found", accepted.id
        for ask in group:
            if ask.orphan is None:
                self.follow(ask.id, ask.tenant)
        return "ok", accepted.id, accepted.position

    def _request(self, ask: Ask) -> Request:
        now_s = self._clock()
        return Request(
            ask.id,
            tuple(range(ask.size)),
            SamplingParams(max_tokens=ask.max_tokens),
            tenant=ask.tenant,
            priority=-1 if ask.ahead else 0,
            num_choices=ask.num_choices,
            deadline_s=None if ask.left is None else now_s + ask.left / 1000,
            queue_deadline_s=None if ask.queue_left is None else now_s + ask.queue_left / 1000,
            orphan_s=None if ask.orphan is None else ask.orphan / 1000,
        )

    def claim(self, worker: str, token: str, room: int) -> list[tuple[str, list[int]]]:
        if not self._runner.run(self._broker.load()).num_waiting:
            return []  # it would wait for something
        return [(job.request.id, list(job.so_far)) for job in self._runner.run(self._broker.claim(room))]

    def commit(self, worker: str, number: int, step: Sequence[Delta]) -> list[Code]:
        deltas = [
            StepDelta(id, start, tuple(ids), finish=Finish(FinishReason(why)) if why else None)
            for id, _, start, ids, why in step
        ]
        verdicts = self._runner.run(self._broker.commit(deltas))
        return [CODES[verdicts[id]] if id in verdicts else 1 for id, *_ in step]

    def release(self, held: Held) -> None:
        self._runner.run(self._broker.release([id for id, _ in held]))

    def cancel(self, id: str, tenant: str) -> None:
        self._runner.run(self._broker.cancel(id, tenant))

    def lookup(self, group: str, tenant: str) -> list[str]:
        try:
            return [request.id for request in self._runner.run(self._broker.lookup(group, tenant))]
        except RequestNotFound:
            return []

    def pass_ms(self, ms: int) -> None:
        self._runner.run(self._pass(ms))

    async def _pass(self, ms: int) -> None:
        self._clock.advance(ms / 1000)

    def follow(self, id: str, tenant: str) -> None:
        """From now on, from its beginning."""
        self.readers[id] = self._runner.run(self._follow(id, tenant))

    async def _follow(self, id: str, tenant: str) -> Reader:
        reader = Reader(self._broker, id, 0, tenant)
        await _settle()
        return reader

    def leave(self, id: str) -> None:
        self._runner.run(self.readers.pop(id).leave())

    def check(self, reference: Reference) -> None:
        self._runner.run(_settle())
        load = self._runner.run(self._broker.load())
        num = {state: len(reference.those(state)) for state in "wr"}
        assert (load.num_waiting, load.num_running) == (num["w"], num["r"])
        for id in [id for id in self.readers if id not in reference.asked]:
            self.leave(id)
        for id, reader in self.readers.items():
            r = reference.asked[id]
            assert (token_ids(reader.entries), *_end(reader)) == (r.log, r.end, r.timings), id


def _end(reader: Reader) -> tuple[object, object]:
    for e in reader.entries:
        if e.finish is not None and e.timings is not None:
            times_s = (e.timings.queue_s, e.timings.ttft_s, e.timings.total_s)
            timings = tuple(None if s is None else round(s * 1000) for s in times_s)
            return (e.finish.reason.value, e.finish.stop_reason), timings
    return None, None


async def _settle() -> None:
    """Whoever can go on does."""
    for _ in range(5):
        await asyncio.sleep(0)
