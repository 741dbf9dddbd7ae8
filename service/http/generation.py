"""One client reading one request, from admission or from a position in it to the end: the same for a stream and for a
whole answer.

Owns which of its sequences have ended and how, the text made from their ids, and, if this process submitted them, their
accounts in the books. It knows no bytes, no status and no dialect. Whoever makes one must call `close` when the client
has its answer or has gone.

Ledger. A sequence that was submitted here is open in the books from `begin` on. It is closed by its terminal entry, by
`fail`, or by `close`: whichever comes first. `close` cancels at the broker whatever had no terminal entry, if the
client's leaving means that; otherwise the sequence goes on without us, and the books say handed over.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

from model.assemble import Assembler
from model.request import Finish, FinishReason, Request, TokenLogprob, Usage
from service.broker.base import CANCELLED, Entry, RequestSide, Timings
from service.errors import MillraceError, Unavailable
from service.http.intake import Intake, Served
from service.logs import fields
from service.metrics import HANDED_OVER, Book, Metrics
from service.traces import Trace

# A log can be replayed without waiting, and a server's send returns at once when the client is gone: without a breath
# now and then the loop would never get to notice, nor anyone else to run. After every entry it would cost as much as
# writing the event; a long entry is taken in parts.
ENTRIES_PER_BREATH = 16
TOKENS_PER_PART = 64
LOOK_S = 1.0  # between two looks at how a request stands whose client wants to know
NO_LOGPROBS = repeat(None)

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """One generated token and the text that is due with it; `offset` is where its text begins, in characters."""

    choice: int
    token_id: int
    text: str
    offset: int
    logprob: TokenLogprob | None


class Standing(NamedTuple):
    """How a request stands before its first token: how many wait before it, None if it does not wait, and how many
    tokens of its prompt are computed."""

    position: int | None
    num_computed: int
    num_prompt: int


class Choice:
    """One sequence: what has come of it so far. `finish` is None until it has ended.

    The client has the first `after` tokens already. All are gone through, for text and events depend on those before.
    `held_back` is text that no token brought: a possible stop string or a broken character that the end left as it was.
    """

    def __init__(self, index: int, request: Request, served: Served, book: Book, after: int) -> None:
        self.index, self.request, self.book, self.after = index, request, book, after
        self.num_tokens = 0
        self.finish: Finish | None = None
        self.timings: Timings | None = None
        self.num_cached, self.result = 0, b""
        self.held_back = ""
        self.told_end = False  # by its terminal entry, and not by a failure here
        self._assembler = Assembler(served.tokenizer, request)
        self._opening = self._assembler.opening  # the echo travels with the first token, so that TTFT stays honest
        self._num_chars = 0

    def take(self, entry: Entry, now_s: float) -> list[Piece]:
        """The entry's tokens as pieces, in order, those that the client has as well."""
        assert entry.start == self.num_tokens, f"{self.request.id}: a gap before {entry.start} at {self.num_tokens}"
        assert len(entry.logprobs) in (0, len(entry.token_ids))
        pieces = []
        for token_id, logprob in zip(entry.token_ids, entry.logprobs or NO_LOGPROBS):  # noqa: B905  # one is endless
            text, offset = self._assembler.push(token_id), self._num_chars
            if self._opening:
                text, offset, self._opening = self._opening + text, offset + len(self._opening), ""
            self.num_tokens += 1
            pieces.append(Piece(self.index, token_id, text, offset, logprob))
            self._num_chars += len(text)
        if entry.token_ids:
            self.book.tokens(len(entry.token_ids), now_s)
        if entry.finish is not None:
            self.finish, self.timings, self.told_end = entry.finish, entry.timings, True
            self.num_cached, self.result = entry.num_cached, entry.result
            self.held_back = self._opening + self._assembler.finish()
            queue_s = entry.timings.queue_s if entry.timings else None
            self.book.end(entry.finish.reason, now_s, queue_s, entry.finish.stop_reason)
        return pieces


class Generation:
    """A request being read from the positions `after`, one for each choice, or from the start. `cancels`: to leave is
    to cancel. The clock gives monotonic seconds."""

    def __init__(
        self,
        intake: Intake,
        served: Served,
        broker: RequestSide,
        metrics: Metrics,
        after: Sequence[int] = (),
        cancels: bool = False,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.intake = intake
        self.cancels = cancels
        self._trace = trace
        self._broker, self._clock = broker, clock
        self._is_ours = False
        self.choices = [
            Choice(index, request, served, Book(metrics), after[index] if after else 0)
            for index, request in enumerate(intake.group)
        ]

    def begin(self, arrived_s: float) -> None:
        """The broker has just taken it from us; its body was in at `arrived_s` on the clock."""
        self._is_ours = True
        for choice in self.choices:
            choice.book.begin(arrived_s, choice.request)

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What comes, as it comes, until every choice has finished. Raises whatever the broker raises."""
        num_parts, logs = 0, [self._follow(choice) for choice in self.choices]
        one = self.choices[0] if len(logs) == 1 else None
        entries: AsyncIterator[Any] = logs[0] if one else _merged(logs)  # one layer less, for every token
        async for item in entries:
            choice, entry = (one, item) if one else (self.choices[item[0]], item[1])
            for part in _parts(entry):
                pieces = choice.take(part, self._clock())
                if pieces:
                    yield pieces
                num_parts += 1
                if num_parts % ENTRIES_PER_BREATH == 0 or len(part.token_ids) == TOKENS_PER_PART:
                    await asyncio.sleep(0)
        if not all(choice.told_end for choice in self.choices):
            raise MillraceError("the log ended without saying how")

    async def glance(self) -> tuple[list[Piece], bool]:
        """What has come so far, without waiting for more, and whether any of it still waits in the queue. Once, and
        instead of `pieces`. Raises `RequestNotFound` and `Unavailable`."""
        pieces, waits = [], False
        for choice in self.choices:
            seen = await self._broker.peek(choice.request.id, choice.request.tenant)
            waits = waits or seen.position is not None
            for part in _parts(seen.log):
                pieces += choice.take(part, self._clock())
                await asyncio.sleep(0)
        return pieces, waits

    async def standings(self) -> AsyncGenerator[Standing, None]:
        """How its first choice stands, at once and whenever that has changed, until a token or its end has come. Where
        the broker can't be asked, nothing new is told."""
        first, told = self.choices[0], None
        while not first.num_tokens and first.finish is None:
            with suppress(Unavailable):
                glance = await self._broker.peek(first.request.id, first.request.tenant)
                if glance.log.token_ids or glance.log.finish:
                    return
                standing = Standing(glance.position, glance.num_computed, len(first.request.asked_ids))
                if standing != told:
                    told = standing
                    yield standing
            await asyncio.sleep(LOOK_S)

    def fail(self, error: Exception) -> None:
        """End what has not ended as an error; the cause is logged, and told only if it is from our own tree."""
        if not isinstance(error, MillraceError):
            logger.error("request %s broke", self.intake.id, exc_info=error)
        told = str(error) if isinstance(error, MillraceError) else "internal error"
        for choice in self.choices:
            if choice.finish is None:
                choice.finish = Finish(FinishReason.ERROR, error=told)
                choice.book.end(FinishReason.ERROR, self._clock())

    def hand_over(self) -> None:
        """It is this process that leaves, not the client: nothing is cancelled."""
        self.cancels = False

    async def close(self) -> None:
        """Settle what has had no terminal entry. Call it whatever happened; it may take one trip to the broker."""
        left = [choice for choice in self.choices if not choice.told_end]
        for choice in left:
            if self.cancels and choice.finish is None:
                choice.finish = CANCELLED
            choice.book.end(choice.finish.reason if choice.finish else HANDED_OVER, self._clock())
        for choice in left if self.cancels else ():
            try:
                await self._broker.cancel(choice.request.id, choice.request.tenant)
            except MillraceError as error:
                logger.warning("request %s could not be cancelled: %s", choice.request.id, error)
        self._log()

    def positions(self) -> list[int]:
        """How many tokens the client has, of each choice."""
        return [
            choice.num_tokens if choice.told_end else max(choice.num_tokens, choice.after) for choice in self.choices
        ]

    def usage(self) -> Usage:
        """Each prompt counts once, generated ids of all choices together. What none of a prompt's choices had to
        compute is cached: what one of them found, another may just have computed."""
        first = self.choices[0].request
        answers = first.num_choices // first.num_prompts
        begins = range(0, len(self.choices), answers)
        num_prompt = sum(len(self.choices[at].request.asked_ids) for at in begins)
        num_cached = sum(min(choice.num_cached for choice in self.choices[at : at + answers]) for at in begins)
        return Usage(num_prompt, sum(choice.num_tokens for choice in self.choices), num_cached)

    def used(self) -> int | None:
        """Tokens of prompts and answers; None while it goes on without this reader."""
        if not self.cancels and not all(choice.told_end for choice in self.choices):
            return None
        usage = self.usage()
        return usage.prompt_tokens + usage.completion_tokens

    def timings(self) -> dict[str, float | None]:
        """Seconds, as the broker tells them; of several choices the earliest claim and first token, the latest end."""
        known = [choice.timings for choice in self.choices if choice.timings is not None]
        return {
            "queue_s": _one(min, (timings.queue_s for timings in known)),
            "ttft_s": _one(min, (timings.ttft_s for timings in known)),
            "total_s": _one(max, (timings.total_s for timings in known)),
        }

    def error(self) -> str | None:
        """What went wrong, if no choice came to a good end."""
        errors = [choice.finish.error for choice in self.choices if choice.finish and choice.finish.error]
        return errors[0] if len(errors) == len(self.choices) else None

    def _follow(self, choice: Choice) -> AsyncIterator[Entry]:
        return self._broker.follow(choice.request.id, choice.request.tenant)

    def _log(self) -> None:
        """One line, and the end of its trace."""
        usage, request = self.usage(), self.intake.group[0]
        outcomes = [str(choice.finish.reason) if choice.finish else HANDED_OVER for choice in self.choices]
        logger.info(
            "request ended" if self._is_ours else "reader of a request ended",
            extra=fields(
                id=self.intake.id,
                model=self.intake.model,
                request_id=request.request_id or None,
                trace_id=request.traceparent[3:35] or None,
                tenant=request.tenant,
                outcome=",".join(outcomes),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                **self.timings(),
            ),
        )
        if self._trace is not None:
            first_s = _one(min, (choice.book.first_s for choice in self.choices))
            told = {"gen_ai.usage.output_tokens": usage.completion_tokens}
            self._trace.end(request, told, outcomes, first_s)


def _one(pick: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(pick(known), 6) if known else None


def _parts(entry: Entry) -> Sequence[Entry]:
    """The entry, in parts that are short enough to hold nobody up."""
    num_tokens, size = len(entry.token_ids), TOKENS_PER_PART
    if num_tokens <= size:
        return (entry,)
    return [
        replace(
            entry,
            start=entry.start + begin,
            token_ids=entry.token_ids[begin : begin + size],
            logprobs=entry.logprobs[begin : begin + size],
            finish=entry.finish if begin + size >= num_tokens else None,
            timings=entry.timings if begin + size >= num_tokens else None,
        )
        for begin in range(0, num_tokens, size)
    ]


async def _merged(logs: list[AsyncIterator[Entry]]) -> AsyncGenerator[tuple[int, Entry], None]:
    """Entries of all logs as they come, until each has ended. The first error of any is raised."""
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
