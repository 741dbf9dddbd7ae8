"""A request's log in the memory of one process: ids, packed, that any number of readers follow from anywhere.

It knows no broker and no bytes. Four bytes for each id, so that a thousand open streams cost little; who appends sees
to it that what comes continues what is there.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from model.request import Finish, TokenLogprob
from service.broker.base import Entry, Timings

UNWATCHED: AbstractContextManager[None] = nullcontext()


class Log:
    """Output ids, their log-probabilities if there are any, and in the end how it ended.

    Who waits is handed what comes: with an event to wait for and the ids to look up again, as libraries have it, a
    token cost half as much again from here to its reader.
    """

    __slots__ = ("_ids", "_logprobs", "_waiting", "error", "finish", "num_cached", "result", "timings")

    def __init__(self) -> None:
        self._ids = array("I")
        self._logprobs: list[TokenLogprob] = []
        self._waiting: list[asyncio.Future[Entry | None]] = []  # readers that have everything
        self.finish: Finish | None = None
        self.timings: Timings | None = None
        self.num_cached, self.result = 0, b""
        self.error: Exception | None = None  # raised to whoever follows, in place of further entries

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def append(self, entry: Entry) -> None:
        """`entry` begins where the log ends, and the log has not ended."""
        assert self.finish is None and entry.start == len(self._ids), (entry.start, len(self._ids), self.finish)
        self._ids.extend(entry.token_ids)
        self._logprobs.extend(entry.logprobs)
        self.finish, self.timings = entry.finish, entry.timings
        self.num_cached, self.result = entry.num_cached, entry.result
        self._wake(entry)

    def fail(self, error: Exception) -> None:
        """End every reader with this error; what is in the log is still told."""
        self.error = error
        self._wake(None)

    def since(self, position: int) -> Entry:
        """Everything from an output position on, as one entry."""
        ids, logprobs = tuple(self._ids[position:]), tuple(self._logprobs[position:])
        if self.finish is None:
            return Entry(position, ids, logprobs)
        return Entry(position, ids, logprobs, self.finish, self.timings, self.num_cached, self.result)

    async def read(self, after: int = 0, reading: AbstractContextManager[None] = UNWATCHED) -> AsyncIterator[Entry]:
        """Live, to the terminal entry. A slow reader costs nothing: it finds all at once what came meanwhile. `reading`
        is held from the first entry on until the reader leaves."""
        with reading:
            position, entry = after, self.since(after)
            while True:
                if entry.token_ids or entry.finish:
                    yield entry
                if entry.finish:
                    return
                position += len(entry.token_ids)
                new: Entry | None = None
                if position >= len(self._ids) and self.finish is None:
                    if self.error is not None:
                        raise self.error
                    waiter: asyncio.Future[Entry | None] = asyncio.get_running_loop().create_future()
                    self._waiting.append(waiter)
                    new = await waiter
                entry = new if new is not None and self._is_rest(new, position) else self.since(position)

    def _is_rest(self, entry: Entry, position: int) -> bool:
        """Whether it is all that there is from this position on: more may have come before its reader went on."""
        end = entry.start + len(entry.token_ids)
        return entry.start == position and end == len(self._ids) and entry.finish is self.finish

    def _wake(self, entry: Entry | None) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():  # who has left is done
                waiter.set_result(entry)


def since(entry: Entry, position: int) -> Entry:
    """The part of an entry from an output position on."""
    skip = min(position - entry.start, len(entry.token_ids))
    return replace(entry, start=entry.start + skip, token_ids=entry.token_ids[skip:], logprobs=entry.logprobs[skip:])
