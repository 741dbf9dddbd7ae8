"""The contract between the HTTP half and the workers: two protocols and the values that cross them.

A request is submitted once, waits, is claimed by a worker, and collects a log of entries; the log of ids is the truth
and everything a client sees follows from it and from the stored request. What every broker promises:

- `submit` admits a whole group (the choices of one client request) or none of it, by number and by tokens. An empty
  queue takes any group, so that one larger than the limits is served too.
- Claims are fair between tenants (`fair.py`). A request of `priority` below 0 goes ahead of the others, until one of
  those has waited `AGEING_S` longer.
- Entries of a request are contiguous, never repeated, never reordered. How many ids come in one entry may differ from
  reader to reader, nothing else.
- Exactly one entry of a request has a `finish`, and it is the last. A queued request that is cancelled or out of time
  ends at once; a running one ends at its worker's next `commit`, whose verdict tells the worker to drop it. The first
  reason counts: what that commit brings for the request, its end included, comes too late and is not written.
- `follow` may be called by several readers, at any time until the log expires, from any position. A reader going away
  ends nothing at once: who wants that calls `cancel`. A request with `orphan_s` is cancelled when nobody has followed
  it for so long; a process that dies or stops is a reader gone like any other.
- A worker that no longer holds a request, or whose ids do not continue the log, gets FENCED for it and its ids are
  not written; the request goes on elsewhere.
- The request is stored beside its log, until `keep_s` after its end.
- All of it is scoped by tenant: another tenant's id is an id that does not exist.

Over Redis the same holds whichever single process dies; the keys are in `redis.py`, the moves in `functions.lua`.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from model.request import Delta, Finish, FinishReason, Request, TokenLogprob

AGEING_S = 10.0
OUT_OF_TIME, OUT_OF_QUEUE_TIME = "timeout_s", "queue_timeout_s"  # the stop_reason of a timeout: which limit it was
CANCELLED = Finish(FinishReason.CANCELLED)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """Both are SHA-256 in hex: of the client's key, and of the body that it came with."""

    name: str
    body: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """`id` is the group's: the known one, with `created` false, if key or group were submitted before. `position` is
    the number of requests that were waiting before this one."""

    id: str
    created: bool = True
    position: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from submit to the first claim, to the first token and to the end; None for what never came."""

    queue_s: float | None
    ttft_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One piece of a request's log: ids from output position `start` on. The terminal one has `finish`, `timings`, and
    if it came from an engine how many tokens of the prompt were not computed but found, and the `result` of what draws
    nothing, as a `Delta` has it."""

    start: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    timings: Timings | None = None
    num_cached: int = 0
    result: bytes = b""


@dataclass(frozen=True, slots=True)
class Glance:
    """One sequence as it is now: its whole log in one entry, terminal if it has ended. `position` is how many wait
    before it, None if it does not wait. Of what runs, `num_computed` prompt tokens are known to be computed."""

    log: Entry
    position: int | None = None
    num_computed: int = 0


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What a door needs to say no early. `full`: a request submitted now would be refused."""

    num_waiting: int
    num_running: int
    oldest_wait_s: float
    full: bool
    retry_after_s: int


@dataclass(frozen=True, slots=True)
class Books:
    """The queue's account, all of one instant: accepted = the sum of ended over all reasons + waiting + running. Of a
    queue that outlives its processes it says what became of everything, whoever died."""

    num_waiting: int
    num_running: int
    oldest_wait_s: float
    num_accepted: int
    num_ended: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed request and the output ids it already has (none unless another worker began it)."""

    request: Request
    so_far: tuple[int, ...] = ()


class Verdict(StrEnum):
    """What a worker must do with a request it holds. Requests not mentioned go on."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FENCED = "fenced"


class RequestSide(Protocol):
    """What the HTTP half holds."""

    async def submit(self, group: Sequence[Request], key: IdempotencyKey | None = None) -> Accepted:
        """Queue a group. Raises `Overloaded`, `Unavailable` and `IdempotencyConflict`, with nothing queued."""
        ...

    async def lookup(self, id: str, tenant: str) -> tuple[Request, ...]:
        """The stored group of a client's id. Raises `RequestNotFound` and `Unavailable`."""
        ...

    def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        """Entries of one sequence from output position `after` on, live, ending with the terminal one. Raises
        `RequestNotFound` where the first entry would be, and `Handover` where this process stops serving it."""
        ...

    async def peek(self, id: str, tenant: str) -> Glance:
        """One sequence, without waiting. To look is not to read: it saves no orphan. Raises `RequestNotFound` and
        `Unavailable`."""
        ...

    async def cancel(self, id: str, tenant: str) -> None:
        """End a sequence that has not ended. Unknown and ended ones are left as they are."""
        ...

    async def load(self) -> QueueLoad:
        """Raises `Unavailable`."""
        ...

    async def books(self) -> Books:
        """Raises `Unavailable`."""
        ...


class WorkerSide(Protocol):
    """What a worker holds."""

    async def claim(self, room: int) -> list[Job]:
        """Up to `room` (>= 1) requests, best first; waits until there is one."""
        ...

    async def commit(self, step: Sequence[Delta]) -> Mapping[str, Verdict]:
        """Append one step's deltas. The verdicts cover every request this worker holds, in the step or not. How far a
        prompt has come may be told to others a second late."""
        ...

    async def release(self, ids: Iterable[str]) -> None:
        """Give requests back to the queue, unfinished, keeping the ids they have."""
        ...

    async def abandon(self, ids: Iterable[str]) -> None:
        """The engine failed while computing these. One of them may be why: where another engine can try, they go back
        to the queue with a crash counted against them; where there is none, they end as errors."""
        ...
