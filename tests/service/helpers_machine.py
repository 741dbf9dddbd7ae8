"""What a queue must do, said a second time and as plainly as can be: lists sorted when they are asked for, counts that
are counted. It shares no code with the product; the state machine compares the two after every step.

All times are milliseconds of the protocol's clock, which moves only where `now` is changed. Ids sort as they arrive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

AGEING, TICK, KEEP = 10_000, 1_000, 20_000
CLEARED, CRASHED, LOST, GUILTY, MAX_CLAIMS, UNSEEN, SUSPECTS = 16, 3, 1, 12, 100, 2, (16, 4, 1)
ENDS = {"c": ("cancelled", None), "t": ("timeout", "timeout_s"), "q": ("timeout", "queue_timeout_s")}

Code = int  # 1 written, -1 fenced, -2 cancelled, -3 out of time
Delta = tuple[str, str, int, list[int], str]  # id, token of the claim, start, ids, reason of the end or ''


@dataclass(frozen=True)
class Ask:
    """What a client wants. `left`, `queue_left`, `orphan`: milliseconds from now, None for no such limit."""

    id: str
    num_choices: int = 1
    tenant: str = "x"
    ahead: bool = False
    weight: float = 1.0
    size: int = 3
    max_tokens: int = 4
    left: int | None = None
    queue_left: int | None = None
    orphan: int | None = None

    @property
    def group(self) -> str:
        return self.id.partition(".")[0]


@dataclass
class Asked:
    """A request that was taken in. `state` is w, r or e: waiting, running, ended."""

    ask: Ask
    tag: float
    t0: int
    deadline: int | None
    queue_deadline: int | None
    due: int | None
    orphan: int | None
    entries: list[list[int]] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    state: str = "w"
    token: str = ""
    worker: str = ""
    doom: str = ""
    end: tuple[str, str | None] | None = None
    timings: tuple[int | None, int | None, int] | None = None
    blame: int = 0
    crashed_at: int = 0
    num_claims: int = 0
    queue_ms: int | None = None
    first_ms: int | None = None

    @property
    def log(self) -> list[int]:
        return [token_id for entry in self.entries for token_id in entry]

    @property
    def place(self) -> tuple[float, str]:
        return self.tag, self.ask.id


class Reference:
    """One queue, any number of workers and of doors."""

    def __init__(self, now: int, max_waiting: int, max_tokens: int) -> None:
        self.now, self.max_waiting, self.max_tokens = now, max_waiting, max_tokens
        self.lose_all()

    def lose_all(self) -> None:
        """As after a restart without data."""
        self.asked: dict[str, Asked] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}  # tenant, name -> group, body
        self.finish: dict[tuple[str, bool], float] = {}  # tenant, class -> finish tag
        self.virtual, self.largest = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        self.leases: dict[str, int] = {}
        self.announced: set[str] = set()
        self.claims: dict[str, tuple[str, list[str]]] = {}  # the last of each worker, with what it got
        self.commits: dict[str, tuple[int, list[Code]]] = {}
        self.dead: list[str] = []
        self.last_end: int | None = None
        self.interval: float | None = None

    def lose_one(self, id: str) -> None:
        """As after a failover to a replica that never heard of it."""
        ask = self.asked.pop(id).ask
        self.keys = {name: known for name, known in self.keys.items() if known[0] != ask.group}

    def those(self, state: str, ahead: bool | None = None) -> list[Asked]:
        """In the order of their turns."""
        found = [r for r in self.asked.values() if r.state == state and ahead in (None, r.ask.ahead)]
        return sorted(found, key=lambda r: r.place)

    # --- the door ----------------------------------------------------------------------------------------------------

    def submit(self, group: Sequence[Ask], key: tuple[str, str] | None = None) -> tuple[object, ...]:
        """('ok', group, place), ('found', group), ('full', waiting, seconds) or ('conflict',)."""
        first = group[0]
        known = self.keys.get((first.tenant, key[0])) if key else None
        if known and key:
            return ("found", known[0]) if known[1] == key[1] else ("conflict",)
        if first.id in self.asked:
            return "found", first.group
        waiting = self.those("w")
        num_tokens = sum(r.ask.size for r in waiting) + sum(ask.size for ask in group)
        if waiting and (len(waiting) + len(group) > self.max_waiting or num_tokens > self.max_tokens):
            wait_s = math.ceil(len(waiting) * (self.interval or 0.0) / 1000)
            return "full", len(waiting), min(60, max(1, wait_s))
        if not waiting and not self.those("r"):
            self.last_end = self.now
        new = [self.admit(ask) for ask in group]
        if key:
            self.keys[first.tenant, key[0]] = (first.group, key[1])
        before = [r for r in self.those("w", first.ahead) if r.place < new[0].place]
        return "ok", first.group, len(before) + (0 if first.ahead else len(self.those("w", True)))

    def admit(self, ask: Ask) -> Asked:
        flow = ask.tenant, ask.ahead
        tag = max(self.virtual[ask.ahead], self.finish.get(flow, 0.0))
        self.finish[flow] = tag + (ask.size + ask.max_tokens) / ask.weight
        self.largest[ask.ahead] = max(self.largest[ask.ahead], self.finish[flow])
        ends = [None if left is None else self.now + left for left in (ask.left, ask.queue_left, ask.orphan)]
        due = min((end for end in ends[:2] if end is not None), default=None)
        new = self.asked[ask.id] = Asked(ask, tag, self.now, ends[0], ends[1], due, ends[2])
        return new

    def restore(self, ask: Ask, ids: list[int], reader: str) -> int:
        if ask.id in self.asked:
            return 0
        back = self.admit(ask)
        back.readers = [reader]
        if ids:  # it has been claimed before
            back.entries, back.queue_deadline, back.due = [ids], None, back.deadline
        return 1

    def heal(self, id: str, ids: list[int], differs: bool) -> int:
        r = self.asked.get(id)
        if r is None:
            return -1
        if r.state == "e" or (len(r.log) >= len(ids) and not differs):
            return 0
        r.entries = [ids]
        if r.state == "r":
            self.put_back(r)
        return 1

    def touch(self, id: str, reader: str, tenant: str | None = None) -> Asked | None:
        """Somebody reads it."""
        r = self.asked.get(id)
        if r is None or tenant not in (None, r.ask.tenant):
            return None
        if r.state != "e":
            r.readers += [] if reader in r.readers else [reader]
            r.orphan = None if r.ask.orphan is None else self.now + r.ask.orphan
        return r

    def lookup(self, group: str, tenant: str) -> list[str]:
        """All of a group, or nothing of it."""
        found = [r.ask for r in self.asked.values() if (r.ask.group, r.ask.tenant) == (group, tenant)]
        return sorted(ask.id for ask in found if len(found) == ask.num_choices)

    def cancel(self, id: str, tenant: str) -> None:
        r = self.asked.get(id)
        if r and r.ask.tenant == tenant:
            self.doom(r, "c")

    # --- the worker --------------------------------------------------------------------------------------------------

    def claim(self, worker: str, token: str, room: int, lease: int) -> list[str]:
        last = self.claims.get(worker)
        if last and last[0] == token:
            return [id for id in last[1] if id in self.asked and self.holds(id, token)]
        ahead, rest, taken = self.those("w", True), self.those("w", False), list[str]()
        while len(taken) < room and (ahead or rest):
            aged = ahead and rest and rest[0].t0 + AGEING <= ahead[0].t0
            r = (rest if aged or not ahead else ahead).pop(0)
            if r.due is not None and r.due <= self.now:
                self.end_by(r, "t")
            elif self.may_take(worker, r):
                self.take(r, worker, token)
                taken.append(r.ask.id)
        self.leases[worker] = self.now + lease
        if taken:
            self.claims[worker] = token, taken
        return taken

    def may_take(self, worker: str, r: Asked) -> bool:
        """Of those with so much counted against them and more, a worker holds so many."""
        held = [h.blame for h in self.those("r") if h.worker == worker]
        return all(sum(c >= 3 * k for c in held) < SUSPECTS[k - 1] for k in range(1, min(r.blame // 3, 3) + 1))

    def take(self, r: Asked, worker: str, token: str) -> None:
        r.state, r.worker, r.token, r.due = "r", worker, token, r.deadline
        r.num_claims += 1
        r.queue_ms = self.now - r.t0 if r.queue_ms is None else r.queue_ms
        self.left_the_queue(r)
        self.virtual[r.ask.ahead] = max(self.virtual[r.ask.ahead], r.tag)

    def left_the_queue(self, r: Asked) -> None:
        """When nobody waits, nobody has an advance or a debt."""
        if not self.those("w", r.ask.ahead):
            self.virtual[r.ask.ahead] = max(self.virtual[r.ask.ahead], self.largest[r.ask.ahead])

    def holds(self, id: str, token: str) -> bool:
        return self.asked[id].state == "r" and self.asked[id].token == token

    def commit(self, worker: str, number: int, step: Sequence[Delta], lease: int) -> list[Code]:
        last = self.commits.get(worker)
        if last and last[0] == number:
            return last[1]
        codes = [self.commit_one(*delta) for delta in step]
        self.leases[worker] = self.now + lease
        self.commits[worker] = number, codes
        return codes

    def commit_one(self, id: str, token: str, start: int, ids: list[int], reason: str) -> Code:
        if id not in self.asked or not self.holds(id, token):
            return -1
        r = self.asked[id]
        why = r.doom or ("t" if r.deadline is not None and r.deadline <= self.now else "")
        if why:
            self.end_by(r, why)
            return -2 if why == "c" else -3
        if start != len(r.log):
            self.put_back(r)
            return -1
        first = bool(ids) and r.first_ms is None
        r.first_ms = self.now - r.t0 if first else r.first_ms
        if reason:
            self.terminal(r, (reason, None), ids)
        elif ids:
            r.entries.append(ids)
            if r.blame and len(r.log) >= r.crashed_at + CLEARED and not first:
                r.blame = 0
        return 1

    def beat(self, worker: str, held: Sequence[tuple[str, str]], lease: int) -> list[Code]:
        self.announced.add(worker)
        self.leases[worker] = self.now + lease
        told = {"": 1, "c": -2, "t": -3}
        return [told[self.asked[i].doom] if i in self.asked and self.holds(i, t) else -1 for i, t in held]

    def release(self, held: Sequence[tuple[str, str]]) -> None:
        for id, token in held:
            if id in self.asked and self.holds(id, token):
                self.asked[id].num_claims -= not self.asked[id].doom
                self.put_back(self.asked[id])

    def abandon(self, held: Sequence[tuple[str, str]]) -> None:
        for id, token in held:
            if id in self.asked and self.holds(id, token):
                self.crash(self.asked[id], CRASHED)

    def lose(self, worker: str, failed: bool = False) -> int:
        """A worker died, by itself or for unknown reasons. How many it held."""
        held = [r for r in self.those("r") if r.worker == worker]
        for r in held:
            self.crash(r, CRASHED if failed else LOST)
        self.announced.discard(worker)
        self.leases.pop(worker, None)
        self.claims.pop(worker, None)
        self.commits.pop(worker, None)
        return len(held)

    # --- time --------------------------------------------------------------------------------------------------------

    def reap(self) -> None:
        for worker in [name for name, end in self.leases.items() if end <= self.now]:
            self.lose(worker)
        for r in list(self.asked.values()):
            if r.due is not None and r.due <= self.now:
                self.come_due(r)
        for r in self.asked.values():
            if r.orphan is not None and r.orphan <= self.now:
                r.orphan = None
                self.doom(r, "c")

    def come_due(self, r: Asked) -> None:
        if r.state == "e":
            self.lose_one(r.ask.id)
        elif r.state == "r" and r.worker not in self.leases:
            self.end_by(r, "t")
        else:
            r.due = self.now + TICK
            self.doom(r, "t")

    # --- one request -------------------------------------------------------------------------------------------------

    def doom(self, r: Asked, why: str) -> None:
        if r.state == "w":
            self.end_by(r, why)
        elif r.state == "r":
            r.doom = r.doom or why

    def put_back(self, r: Asked) -> None:
        """To its old place, unless it was to end anyway."""
        if r.doom:
            return self.end_by(r, r.doom)
        r.state, r.worker, r.token, r.due = "w", "", "", r.deadline

    def crash(self, r: Asked, count: int) -> None:
        if r.doom:
            return self.end_by(r, r.doom)
        if r.blame and len(r.log) <= r.crashed_at + UNSEEN:
            r.blame += count
        else:
            r.blame, r.crashed_at = count, len(r.log)
        if r.blame < GUILTY and r.num_claims < MAX_CLAIMS:
            return self.put_back(r)
        self.dead.append(r.ask.id)
        self.terminal(r, ("error", None))

    def end_by(self, r: Asked, why: str) -> None:
        queued, limit = r.state == "w" and r.queue_ms is None, r.queue_deadline
        in_queue = queued and limit is not None and limit <= self.now and (r.deadline is None or limit <= r.deadline)
        self.terminal(r, ENDS["q" if why == "t" and in_queue else why])

    def terminal(self, r: Asked, end: tuple[str, str | None], ids: list[int] | None = None) -> None:
        ran = r.state == "r"
        r.entries.append(ids or [])
        r.state, r.end, r.orphan = "e", end, None
        r.timings = r.queue_ms, r.first_ms, self.now - r.t0
        if ran:
            gap = max(0, self.now - (self.now if self.last_end is None else self.last_end))
            mean = gap if self.interval is None else self.interval
            self.last_end, self.interval = self.now, mean + 0.1 * (gap - mean)
        else:
            self.left_the_queue(r)
        group = [other for other in self.asked.values() if other.ask.group == r.ask.group]
        whole = all(other.state == "e" for other in group)  # it is kept from its last end on
        r.due = None
        for other in group if whole else ():
            other.due = self.now + KEEP
