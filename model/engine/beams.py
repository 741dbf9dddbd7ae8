"""Beam search: several beginnings of one answer side by side, of which in every round the likeliest go on.

Each beginning is a sequence of the scheduler's like any other: it waits, runs, is preempted and comes back. What is
special is here: a sequence that has been computed to its end is held, its gap zero, until all of its search are; then
the likeliest continuations are shared out, and one that leaves its own beginning for another's is a fork of that one's
sequence. Scores are as in transformers' generation: the sum of log-probabilities divided by the length to the power of
`length_penalty`, ended answers and those that go on together, until no one that goes on is better than the worst of
`beam_width` ended ones.

No search waits for another for ever. One begins only while there are seats for all beginnings of all searches, and if
the cache could hold all of its own; beginnings of one search are neighbours in rank.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from model.config import EngineConfig
from model.engine.scheduler import Fork, Scheduler
from model.engine.sequence import Sequence
from model.request import Delta, Finish, FinishReason, Request, TokenLogprob

Ended = tuple[float, list[int], bool]  # score, ids, is the last one a stop id


@dataclass(slots=True)
class _Search:
    """`begun` has each beginning's sum of log-probabilities and ids, in the order of `sequences`; `told`, by their
    number, what may follow those that have been computed in this round."""

    request: Request
    limit: int  # ids of an answer
    sequences: list[Sequence]
    begun: list[tuple[float, list[int]]]
    told: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)


class Beams:
    """The searches of one engine. `fork` copies what a runner keeps of one sequence for another."""

    def __init__(self, scheduler: Scheduler, config: EngineConfig, fork: Callable[[Fork], None]) -> None:
        self._scheduler, self._config, self._fork = scheduler, config, fork
        self._waiting: deque[Request] = deque()
        self._searches: dict[str, _Search] = {}
        self._places: dict[str, tuple[_Search, int]] = {}  # by a sequence's id

    @property
    def num_waiting(self) -> int:
        """Searches that have not begun."""
        return len(self._waiting)

    def add(self, request: Request) -> Delta | None:
        """Take a search in; what is to be told at once of one that can't ever run."""
        width, num_prompt = request.sampling.beam_width, len(request.prompt_ids)
        longest = min(num_prompt + request.sampling.max_tokens, self._config.max_model_len)
        num_blocks, num_seats = -(-longest // self._config.block_size) * width, self._num_seats
        if num_blocks > self._config.num_blocks or width > num_seats:
            need = f"{width} beams of {longest} tokens need {width} seats and {num_blocks} cache blocks"
            error = f"{need}, and there are {num_seats} and {self._config.num_blocks}"
            return Delta(request.id, 0, finish=Finish(FinishReason.ERROR, error=error))
        self._waiting.append(request)
        return None

    def begin(self) -> None:
        """Let those begin for whom there are seats, in the order in which they came."""
        taken = sum(search.request.sampling.beam_width for search in self._searches.values())
        while self._waiting and taken + self._waiting[0].sampling.beam_width <= self._num_seats:
            request = self._waiting.popleft()
            taken += request.sampling.beam_width
            limit = min(request.sampling.max_tokens, self._config.max_model_len - len(request.prompt_ids))
            search = _Search(request, limit, [], [(0.0, [])])
            self._searches[request.id] = search
            self._scheduler.add(self._sequence(search, 0))

    def cancel(self, id: str) -> None:
        """Forget a search; an unknown id is no error."""
        self._waiting = deque(request for request in self._waiting if request.id != id)
        if id in self._searches:
            self._close(self._searches[id])

    def has(self, sequence: Sequence) -> bool:
        """Whether a sequence is a beginning of a search's."""
        return sequence.id in self._places

    def failed(self, sequence: Sequence, finish: Finish) -> Delta:
        """One of its sequences ends a search."""
        search, _ = self._places[sequence.id]
        self._close(search)
        return Delta(search.request.id, 0, finish=finish)

    def drew(self, sequence: Sequence, logprob: TokenLogprob | None, finish: Finish | None) -> Delta | None:
        """A sequence has been computed to its end. Once all of its search have, the round is decided; the answer, if
        it was the last one."""
        if sequence.id not in self._places:
            return None  # its search has failed in the same step
        search, number = self._places[sequence.id]
        if finish is not None and finish.reason == FinishReason.ERROR:
            return self.failed(sequence, finish)
        assert logprob is not None, f"{sequence.id} asks for log-probabilities"
        if finish is None:
            sequence.output_ids.pop()  # the round decides what follows; with nothing to compute it is held
        search.told[number] = logprob.top
        if len(search.told) < len(search.begun):
            return None
        following = self._decide(search)
        if following:
            self._share_out(search, following)
            return None
        _, ids, stopped = max(search.ended, key=lambda each: each[0])
        self._close(search)
        last = ids[-1] if stopped and ids[-1] not in search.request.sampling.eos_ids else None
        end = Finish(FinishReason.STOP, stop_reason=last) if stopped else Finish(FinishReason.LENGTH)
        return Delta(search.request.id, 0, tuple(ids), finish=end)

    def _decide(self, search: _Search) -> list[tuple[float, int, int]]:
        """What goes on, best first: score, number of the beginning, id. Nothing, if the search is over."""
        params = search.request.sampling
        width, length = params.beam_width, len(search.begun[0][1]) + 1
        weight = length**params.length_penalty
        found = [
            (search.begun[number][0] + logprob, number, token_id)
            for number, top in sorted(search.told.items())
            for token_id, logprob in top
            if length > params.min_tokens or token_id not in params.stop_token_ids
        ]
        found.sort(key=lambda each: -each[0])  # of equals the earlier one stays first
        search.told.clear()
        following: list[tuple[float, int, int]] = []
        for place, (score, number, token_id) in enumerate(found):
            if token_id in params.stop_token_ids:
                if place < width:
                    search.ended.append((score / weight, [*search.begun[number][1], token_id], True))
            elif len(following) < width:
                following.append((score, number, token_id))
        search.ended.sort(key=lambda each: -each[0])
        del search.ended[width:]
        if length >= search.limit or len(following) < width:  # a vocabulary may be as small as that
            search.ended += [(score / weight, [*search.begun[n][1], i], False) for score, n, i in following]
            return []
        over = len(search.ended) == width and search.ended[-1][0] >= following[0][0] / weight
        return [] if over else following

    def _share_out(self, search: _Search, following: list[tuple[float, int, int]]) -> None:
        """Each beginning's first continuation stays with its sequence; the others go to sequences that have none."""
        places: dict[int, tuple[float, int, int]] = {}
        moving: list[tuple[float, int, int]] = []
        for each in following:
            if each[1] in places:
                moving.append(each)
            else:
                places[each[1]] = each
        free = [number for number in range(len(following)) if number not in places]
        for number, each in zip(free, moving, strict=True):
            child = search.sequences[number] if number < len(search.sequences) else self._sequence(search, number)
            parent = search.sequences[each[1]]
            child.output_ids = list(search.begun[each[1]][1])
            fork = self._scheduler.fork(parent, child)
            if fork is not None:
                self._fork(fork)
            places[number] = each
        begun = search.begun
        search.begun = [(score, [*begun[old][1], i]) for _, (score, old, i) in sorted(places.items())]
        for sequence, (_, ids) in zip(search.sequences, search.begun, strict=True):
            sequence.output_ids = list(ids)

    def _sequence(self, search: _Search, number: int) -> Sequence:
        """A new beginning. It never ends by its ids; what may follow it is told by their log-probabilities."""
        params = search.request.sampling
        # Of the likeliest, at most all stop ids can be of no use.
        num_top = params.beam_width + max(params.beam_width, len(params.stop_token_ids))
        plain = replace(
            params, temperature=0.0, num_logprobs=num_top, max_tokens=search.limit + 1, min_tokens=0,
            stop_token_ids=(), eos_ids=(),
        )  # fmt: skip
        request = replace(search.request, id=f"{search.request.id}/{number}", sampling=plain)
        sequence = Sequence(request, self._config.max_model_len, branch=number)
        search.sequences.append(sequence)
        self._places[sequence.id] = search, number
        return sequence

    def _close(self, search: _Search) -> None:
        del self._searches[search.request.id]
        for sequence in search.sequences:
            self._scheduler.finish(sequence.id)
            del self._places[sequence.id]

    @property
    def _num_seats(self) -> int:
        return min(self._config.max_num_seqs, self._config.max_batch_tokens)
