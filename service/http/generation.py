"""The life of one client's request, from admission to its end: the same for a stream and for a whole answer.

Owns which of its sequences have ended and how, the text made from their ids, and their accounts in the books. It knows
no bytes, no status and no dialect. Whoever makes one must call `close` when the client has its answer or has gone.

Ledger. A sequence is open in the books from `submit` on. It is closed by its terminal entry, by `fail`, or by `close`
(as cancelled): whichever comes first. `close` cancels at the broker whatever had no terminal entry.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import NamedTuple

from model.assemble import Assembler
from model.request import Finish, FinishReason, Request, TokenLogprob, Usage
from service.broker.base import Entry, RequestSide
from service.errors import MillraceError
from service.http.intake import Intake, Served
from service.logs import fields
from service.metrics import Book, Metrics

# A log can be replayed without waiting, and a server's send returns at once when the client is gone: without a breath
# now and then the loop would never get to notice. After every entry it would cost as much as writing the event.
ENTRIES_PER_BREATH = 16

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """One generated token and the text that is due with it; `offset` is where its text begins, in characters.

    A piece without a token carries text that was held back (a possible stop string, a broken character) until an end
    that came without one.
    """

    choice: int
    token_id: int | None
    text: str
    offset: int
    logprob: TokenLogprob | None


class Choice:
    """One sequence: what has come of it so far. `finish` is None until it has ended."""

    def __init__(self, index: int, request: Request, served: Served, book: Book) -> None:
        self.index, self.request, self.book = index, request, book
        self.num_tokens = 0
        self.finish: Finish | None = None
        self.queue_s: float | None = None
        self.told_end = False  # by its terminal entry, and not by a failure here
        self._assembler = Assembler(served.tokenizer, request)
        self._opening = self._assembler.opening  # the echo travels with the first token, so that TTFT stays honest
        self._num_chars = 0

    def take(self, entry: Entry, now_s: float) -> list[Piece]:
        """The entry's tokens as pieces, in order."""
        assert entry.start == self.num_tokens, f"{self.request.id}: a gap before {entry.start} at {self.num_tokens}"
        pieces = []
        logprobs: tuple[TokenLogprob | None, ...] = entry.logprobs or (None,) * len(entry.token_ids)
        for token_id, logprob in zip(entry.token_ids, logprobs, strict=True):
            opening, self._opening = self._opening, ""
            text = opening + self._assembler.push(token_id)
            pieces.append(Piece(self.index, token_id, text, self._num_chars + len(opening), logprob))
            self._num_chars += len(text)
        if entry.token_ids:
            self.num_tokens += len(entry.token_ids)
            self.book.tokens(len(entry.token_ids), now_s)
        if entry.finish is not None:
            self._end(entry, now_s, pieces)
        return pieces

    def _end(self, entry: Entry, now_s: float, pieces: list[Piece]) -> None:
        assert entry.finish is not None
        self.finish, self.queue_s, self.told_end = entry.finish, entry.queue_s, True
        self.book.end(entry.finish.reason, now_s, entry.queue_s)
        held_back = self._opening + self._assembler.finish()
        if held_back and pieces:
            pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + held_back)
        elif held_back:
            pieces.append(Piece(self.index, None, held_back, self._num_chars, None))


class Generation:
    """A request being answered. `arrived_s` is on the clock, which is monotonic seconds."""

    def __init__(
        self,
        intake: Intake,
        served: Served,
        broker: RequestSide,
        metrics: Metrics,
        arrived_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.intake = intake
        self._broker, self._arrived_s, self._clock = broker, arrived_s, clock
        self.choices = [
            Choice(index, request, served, Book(metrics, arrived_s)) for index, request in enumerate(intake.group)
        ]

    async def submit(self) -> None:
        """Queue it, whole. Raises `Overloaded` and `Unavailable`, with nothing queued and nothing in the books."""
        await self._broker.submit(self.intake.group)
        for choice in self.choices:
            choice.book.begin()

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What comes, as it comes, until every choice has finished. Raises whatever the broker raises."""
        num_entries = 0
        async with aclosing(_merged([self._follow(choice) for choice in self.choices])) as entries:
            async for index, entry in entries:
                yield self.choices[index].take(entry, self._clock())
                num_entries += 1
                if num_entries % ENTRIES_PER_BREATH == 0:
                    await asyncio.sleep(0)
        if not all(choice.told_end for choice in self.choices):
            raise MillraceError("the log ended without saying how")

    def fail(self, error: Exception) -> None:
        """End what has not ended as an error; the cause is logged, and told only if it is from our own tree."""
        if not isinstance(error, MillraceError):
            logger.error("request %s broke", self.intake.id, exc_info=error)
        told = str(error) if isinstance(error, MillraceError) else "internal error"
        for choice in self.choices:
            if choice.finish is None:
                choice.finish = Finish(FinishReason.ERROR, error=told)
                choice.book.end(FinishReason.ERROR, self._clock())

    async def close(self) -> None:
        """Stop what still runs and close the books. Call it whatever happened; it may take one trip to the broker."""
        left = [choice for choice in self.choices if not choice.told_end]
        for choice in left:
            if choice.finish is None:
                choice.finish = Finish(FinishReason.CANCELLED)
            choice.book.end(choice.finish.reason, self._clock())
        for choice in left:
            try:
                await self._broker.cancel(choice.request.id, choice.request.tenant)
            except MillraceError as error:
                logger.warning("request %s could not be cancelled: %s", choice.request.id, error)
        self._log()

    def usage(self) -> Usage:
        """The prompt counts once, generated ids of all choices together."""
        return Usage(len(self.choices[0].request.prompt_ids), sum(choice.num_tokens for choice in self.choices))

    def timings(self) -> dict[str, float | None]:
        """Seconds; of several choices the earliest claim and the earliest first token."""
        queued = [choice.queue_s for choice in self.choices if choice.queue_s is not None]
        first = [choice.book.ttft_s for choice in self.choices if choice.book.ttft_s is not None]
        return {
            "queue_s": round(min(queued), 6) if queued else None,
            "ttft_s": round(min(first), 6) if first else None,
            "total_s": round(self._clock() - self._arrived_s, 6),
        }

    def error(self) -> str | None:
        """What went wrong, if no choice came to a good end."""
        errors = [choice.finish.error for choice in self.choices if choice.finish and choice.finish.error]
        return errors[0] if len(errors) == len(self.choices) else None

    def _follow(self, choice: Choice) -> AsyncIterator[Entry]:
        return self._broker.follow(choice.request.id, choice.request.tenant)

    def _log(self) -> None:
        usage = self.usage()
        outcomes = ",".join(choice.finish.reason.value for choice in self.choices if choice.finish)
        logger.info(
            "request ended",
            extra=fields(
                id=self.intake.id,
                model=self.intake.model,
                outcome=outcomes,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                **self.timings(),
            ),
        )


async def _merged(logs: list[AsyncIterator[Entry]]) -> AsyncGenerator[tuple[int, Entry], None]:
    """Entries of all logs as they come, until each has ended. The first error of any is raised."""
    if len(logs) == 1:
        async for entry in logs[0]:
            yield 0, entry
        return
    # Bounded: a slow reader leaves entries where they are, in the broker's logs.
    queue: asyncio.Queue[tuple[int, Entry | Exception | None]] = asyncio.Queue(len(logs))

    async def pump(index: int, log: AsyncIterator[Entry]) -> None:
        try:
            async for entry in log:
                await queue.put((index, entry))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, log)) for index, log in enumerate(logs)]
    try:
        num_open = len(logs)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
