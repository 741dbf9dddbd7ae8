"""A request's log in the memory of one process: ids, packed, that any number of readers follow from anywhere.

It knows no broker and no bytes. Four bytes for each id, so that a thousand open streams cost little; who appends sees
to it that what comes continues what is there.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace

from model.request import Finish, TokenLogprob
from service.broker.base import Entry, Timings


class Log:
    """Output ids, their log-probabilities if there are any, and in the end how it ended."""

    __slots__ = ("_changed", "_ids", "_logprobs", "error", "finish", "timings")

    def __init__(self) -> None:
        self._ids = array("I")
        self._logprobs: list[TokenLogprob] = []
        self._changed = asyncio.Event()  # pulsed at every change
        self.finish: Finish | None = None
        self.timings: Timings | None = None
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
        self.pulse()

    def fail(self, error: Exception) -> None:
        """End every reader with this error; what is in the log is still told."""
        self.error = error
        self.pulse()

    def pulse(self) -> None:
        """Wake every reader."""
        self._changed.set()
        self._changed.clear()

    def since(self, position: int) -> Entry:
        """Everything from an output position on, as one entry."""
        end = None if self.finish is None else self.timings
        return Entry(
            position, tuple(self._ids[position:]), tuple(self._logprobs[position:]), finish=self.finish, timings=end
        )

    async def read(self, after: int = 0) -> AsyncIterator[Entry]:
        """Live, to the terminal entry. A slow reader costs nothing: it finds all at once what came meanwhile."""
        position = after
        while True:
            entry = self.since(position)
            if entry.token_ids or entry.finish:
                yield entry
            if entry.finish:
                return
            position += len(entry.token_ids)
            if position >= self.num_tokens and self.finish is None:
                if self.error is not None:
                    raise self.error
                await self._changed.wait()


def since(entry: Entry, position: int) -> Entry:
    """The part of an entry from an output position on."""
    skip = min(position - entry.start, len(entry.token_ids))
    return replace(entry, start=entry.start + skip, token_ids=entry.token_ids[skip:], logprobs=entry.logprobs[skip:])
