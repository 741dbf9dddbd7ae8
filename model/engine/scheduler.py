"""Who is computed in the next step, and with which cache blocks.

There are no phases: each step every running sequence closes part of the gap between the tokens it has and the tokens
computed. A prompt cut into chunks, decoding, coming back from preemption and taking over from another worker are all
that one rule. The scheduler owns the sequences and their blocks; it knows no tensors, no text and no feature by name.

Why nothing starves or hangs: the best-ranked running sequence may take the blocks of every other, and any sequence
that could not fit into the whole cache by itself is ended with an error; so it goes on in every step, ends, and another
is then the best-ranked. Whoever waits at the head of the queue is overtaken only by better ranks.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from model.cache.blocks import BlockPool
from model.config import EngineConfig
from model.engine.line import Line
from model.engine.pace import Pace
from model.engine.prefix import Prefixes
from model.engine.reach import Reach
from model.engine.sequence import Sequence
from model.request import Finish, FinishReason


class Chunk(NamedTuple):
    """Tokens of one sequence to compute: `num_tokens` from position `start`. `draws`: they reach the end of what is
    known, so that the last one's logits give the next id. `sequence.blocks` covers them, if it keeps any.

    A tuple like `Outcome`, since there are hundreds of both in each step, and a frozen dataclass takes twice as long.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool


READ = Finish(FinishReason.STOP)  # of what was to be computed, and no more


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work, best rank first; each sequence at most once. Without chunks there is nothing to compute."""

    chunks: tuple[Chunk, ...]
    num_tokens: int


class Fork(NamedTuple):
    """What a runner has to copy for a sequence that goes on where another is: the block that both would write into
    (None: there is none), and what lives in the slot; each from, to."""

    block: tuple[int, int] | None
    slot: tuple[int, int]


class Outcome(NamedTuple):
    """What a step did to a sequence: `num_new` ids (0 or 1) at the end of its output, and `finish` if it ended."""

    sequence: Sequence
    num_new: int
    finish: Finish | None


class Scheduler:
    """Sequences wait, run, may be preempted back to waiting, and end exactly once: in an `Outcome`, or by `finish`.

    One thread: `plan`, compute, `commit`, in turn; or, so that a device need not wait for the host, `plan`, start to
    compute, `advance`, `plan` the next step, start it, and only then `commit` the one before. `add` and `finish` at any
    time in between.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.prefixes = Prefixes(self.pool, config.block_size, self.owns)
        self.num_preemptions = 0
        self._config = config
        # Each running sequence is worth at least one token in each step, so none has to take turns.
        self._num_seats = min(config.max_num_seqs, config.max_batch_tokens)
        self._free_slots = list(range(self._num_seats))
        self._reach = Reach(config.needs, config.block_size)
        fits = self._reach.num_least <= config.num_blocks
        # Tokens that a sequence may have.
        self._num_fit = config.max_model_len if fits else config.num_blocks * config.block_size
        self._num_added = 0
        self._by_id: dict[str, Sequence] = {}
        self._waiting = Line(self.owns)
        self._running: list[Sequence] = []  # always in order of rank
        self._ended: list[Outcome] = []  # ended by `add`, told by the next `commit`
        self._advanced: StepPlan | None = None
        self.pace = Pace(config.max_batch_tokens, config.attention_half)
        self._budget = config.max_batch_tokens  # of the last step

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """There is something to compute or to tell: `plan` and `commit` should be called."""
        return bool(self._by_id or self._ended)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in. One that is complete already, or can't ever fit, ends with the next `commit`."""
        assert sequence.id not in self._by_id, f"{sequence.id} is here already"
        assert sequence.num_total > 0, f"{sequence.id} has no id to start from"
        finish = sequence.end() or self._misfit(sequence)
        if finish:
            self._ended.append(Outcome(sequence, 0, finish))
            return
        sequence.arrival = self._num_added
        self._num_added += 1
        # Ledger: the sequence is the scheduler's now, waiting, without blocks.
        self._by_id[sequence.id] = sequence
        self._waiting.add(sequence)

    def finish(self, id: str) -> bool:
        """End a sequence for the caller's reason (cancelled, out of time, stop string, failed), waiting or running.

        Its blocks are free on return, and `commit` passes over it. False: it is not here (any more).
        """
        sequence = self._by_id.pop(id, None)
        if sequence is None:
            return False
        if not self._unseat(sequence):
            self._waiting.left()
        self._free(sequence)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> Fork | None:
        """The child, new or here already, has the parent's ids and goes on from where that one is: it shares the full
        blocks and gets a block of its own for the tokens behind them. Before the next `plan` the caller copies what it
        is told. None: the child has to wait, or its parent does, and what is missing will be computed."""
        if child.id not in self._by_id:
            child.arrival = parent.arrival
            # Ledger: the sequence is the scheduler's now, with a free slot or waiting.
            self._by_id[child.id] = child
            if self._free_slots:
                child.slot = self._free_slots.pop()
                insort(self._running, child, key=attrgetter("rank"))
            else:
                self._waiting.add(child)
        self._free(child)
        child.names = list(parent.names)
        if child.slot < 0 or parent.slot < 0:
            return None
        size = self._config.block_size
        whole, rest = divmod(parent.num_computed, size)
        rest = rest if self.pool.num_free else 0
        # Ledger: n owners of the full blocks -> n + 1, a free block -> the child's.
        self.pool.share(parent.blocks[:whole])
        child.blocks = [*parent.blocks[:whole], *self.pool.take(1 if rest else 0)]
        child.num_computed = whole * size + rest
        return Fork((parent.blocks[whole], child.blocks[whole]) if rest else None, (parent.slot, child.slot))

    def spoil(self, sequence: Sequence) -> None:
        """Its numbers turned out not to be finite: nobody shall find its blocks, not even those that looked good."""
        self.pool.forget(sequence.owned())

    def plan(self) -> StepPlan:
        """Choose the next step's chunks and give them blocks, best rank first.

        One token is set aside for every sequence that is one token behind, so that long prompts never hold up those
        that are decoding; the others share the rest of the budget, which `pace` sets, in order. Preempts the worst rank
        when blocks run out; who is the worst rank itself waits for a step, with what it has.
        """
        self._admit()
        line, num_set_aside = self._line()
        chunks: list[Chunk] = []
        is_read = False  # something longer than a token is in the plan
        size, num_reading = self._config.block_size, len(line) - num_set_aside
        num_reading += min(len(self._waiting), self._num_seats - len(self._running))
        position = next((each.num_computed for each, cost in line if cost > 1), 0) if num_reading else 0
        self._budget = num_left = self.pace.budget(num_set_aside, num_reading, position)
        while line:
            sequence, cost = line.popleft()
            if cost == 0:
                continue  # held: there is nothing to compute, but its blocks can be taken
            num_set_aside -= cost == 1
            start = sequence.num_computed
            if sequence.is_whole:
                # What others leave of the pace's budget may never be enough for it: all that a step can hold counts.
                if cost <= num_left + self._config.max_batch_tokens - self._budget:
                    chunks.append(Chunk(sequence, 0, cost, False))
                    num_left -= cost
                continue
            if cost == 1 and start < len(sequence.blocks) * size and num_left > num_set_aside:
                chunks.append(Chunk(sequence, start, 1, sequence.draws))  # the usual case, and so the short way
                num_left -= 1
                continue
            gap = sequence.gap
            if gap > 1 and self.prefixes.is_coming(sequence):
                continue
            if (num_beside := cost - gap) and num_left - num_set_aside <= num_beside:
                if is_read:
                    continue
                # It comes in one piece, however long: the first who reads makes the step longer, the others wait.
                num_more = num_beside + 1 + num_set_aside - num_left
                num_left, self._budget = num_left + num_more, self._budget + num_more
            while num_left > num_set_aside and self._room(sequence) == 0 and line:
                victim, its_cost = line.pop()  # the worst rank; those in line have no chunk yet
                num_set_aside -= its_cost == 1
                self._preempt(victim)
            num_tokens = min(gap, num_left - num_set_aside - num_beside, self._room(sequence))
            if num_tokens <= 0:
                continue
            is_read |= cost > 1
            end = start + num_tokens
            # Ledger: free blocks become the sequence's, just enough for the tokens of this chunk.
            sequence.blocks += self.pool.take(self._reach.num_places(end) - len(sequence.blocks))
            if num_tokens > 1 and self._config.prefix_cache:
                self.prefixes.promise(sequence, start, end)
            chunks.append(Chunk(sequence, start, num_tokens, draws=num_tokens == gap and sequence.draws))
            num_left -= num_tokens + num_beside
        return StepPlan(tuple(chunks), self._budget - num_left)

    def advance(self, plan: StepPlan) -> None:
        """Count a plan's tokens as computed and its ids as drawn, though they are not known yet."""
        self._advanced = plan
        owned = self._by_id
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if owned.get(sequence.id) is sequence:
                assert sequence.num_computed == chunk.start, f"{sequence.id}: a plan is advanced once"
                sequence.num_computed += chunk.num_tokens
                sequence.num_pending += chunk.draws

    def commit(self, plan: StepPlan, drawn: Mapping[str, int]) -> list[Outcome]:
        """Enter a computed plan: `drawn` has an id for each chunk that draws (those ended since need none).

        Returns the outcome of everyone who got an id or ended. Blocks of the ended are free on return.
        """
        if self._advanced is not plan:
            self.advance(plan)
        self._advanced = None
        outcomes, self._ended = self._ended, []
        owned, size = self._by_id, self._config.block_size if self._config.prefix_cache else 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if owned.get(sequence.id) is not sequence:
                continue
            end = chunk.start + chunk.num_tokens
            if size and not sequence.is_whole and (chunk.num_tokens > 1 or end % size == 0):
                self.prefixes.computed(sequence, chunk.start, end)
            if not sequence.draws and end == sequence.num_total:
                self.finish(sequence.id)
                outcomes.append(Outcome(sequence, 0, READ))
            if not chunk.draws:
                continue
            sequence.num_pending = 0
            sequence.output_ids.append(drawn[sequence.id])
            finish = sequence.end() or (self._misfit(sequence) if end >= self._num_fit else None)
            if finish:
                self.finish(sequence.id)
            outcomes.append(Outcome(sequence, 1, finish))
        return outcomes

    def owns(self, sequence: Sequence) -> bool:
        """Whether the sequence is waiting or running here: not ended, and no other one under its id."""
        return self._by_id.get(sequence.id) is sequence

    def _at_its_end(self, sequence: Sequence) -> bool:
        """It has a pending id, and will end when that is committed: there is nothing more to compute."""
        return sequence.at_its_end or self._reach.num_needed(sequence.num_total) > self.pool.num_blocks

    def _line(self) -> tuple[deque[tuple[Sequence, int]], int]:
        """Those who run and have something to compute, with what it costs, best rank first; and how many are one token
        behind. What others have computed for them meanwhile is theirs."""
        line = deque[tuple[Sequence, int]]()
        num_single, size = 0, self._config.block_size if self._config.prefix_cache else self._config.max_model_len
        for sequence in self._running:
            gap = sequence.gap
            if sequence.num_pending and self._at_its_end(sequence):
                continue
            if gap > size:
                self.prefixes.adopt(sequence, self.prefixes.matching(sequence))
            if self._reach.slides:
                # Ledger: its blocks that no token from here on needs -> free.
                self.pool.give_back(self._reach.slide(sequence))
            cost = sequence.cost
            num_single += cost == 1
            line.append((sequence, cost))
        return line, num_single

    def _admit(self) -> None:
        """Seat waiting sequences, best rank first, as long as this step has tokens for them and the cache has blocks
        for all that is known of everyone running, and one more for each: none is admitted only to be preempted."""
        if not self._waiting or len(self._running) >= self._num_seats:
            return
        reading = deque(other for other in self._running if other.cost > 1)
        num_ahead = len(self._running) - len(reading)
        num_owed = sum(self._num_owed(other) for other in self._running)
        while (head := self._waiting.head()) is not None and len(self._running) < self._num_seats:
            while reading and reading[0].rank < head.rank:
                num_ahead += reading.popleft().cost
            if num_ahead >= self._budget:
                return
            found = self.prefixes.matching(head) if self._config.prefix_cache else []
            # Of what is found, only what somebody owns is not among the free ones.
            num_needed = num_owed + self._num_owed(head) - sum(self.pool.num_owners(block) > 0 for block in found)
            # Alone it is let in without a spare block: it fits (see `_misfit`) and has nobody to wait for.
            if self._running and num_needed > self.pool.num_free:
                return
            # Ledger: waiting -> running, a free slot -> its own. Blocks come chunk by chunk, but for those found.
            self._waiting.pop()
            head.slot = self._free_slots.pop()
            insort(self._running, head, key=attrgetter("rank"))
            self.prefixes.adopt(head, found)
            num_ahead += head.cost
            num_owed += self._num_owed(head)

    def _num_owed(self, sequence: Sequence) -> int:
        """Blocks that it has yet to get for all that is known of it, and one more."""
        if sequence.is_whole:
            return 0
        return max(0, self._reach.num_wanted(sequence.num_total, self._config.max_batch_tokens) - sequence.num_owned)

    def _unseat(self, sequence: Sequence) -> bool:
        """It does not run any more. False: it did not."""
        at = bisect_left(self._running, sequence.rank, key=attrgetter("rank"))
        if at == len(self._running) or self._running[at] is not sequence:
            return False
        del self._running[at]
        # Ledger: its slot -> free.
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Its outputs stay, and its tokens will be computed again where others have taken its blocks by then. With its
        old arrival it is first of its priority."""
        # Ledger: running -> waiting, its blocks -> free, where they can be found.
        self._unseat(victim)
        self._free(victim)
        self._waiting.add(victim)
        self.num_preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        # Ledger: the sequence is no longer an owner of its blocks.
        self.pool.give_back(sequence.owned())
        sequence.num_seen = max(sequence.num_seen, sequence.num_computed)
        sequence.blocks, sequence.held_back, sequence.num_slid, sequence.num_computed = [], [], 0, 0

    def _misfit(self, sequence: Sequence) -> Finish | None:
        """The error for a sequence whose known tokens need more blocks than there are, None if they fit."""
        if sequence.is_whole:
            most = self._config.max_batch_tokens
            told = f"{sequence.num_total} tokens are seen in one step or not at all, and it holds {most}"
            return None if sequence.num_total <= most else Finish(FinishReason.ERROR, error=told)
        num_needed = self._reach.num_needed(sequence.num_total)
        if num_needed <= self.pool.num_blocks:
            return None
        return Finish(
            FinishReason.ERROR,
            error=f"{sequence.num_total} tokens need {num_needed} cache blocks of {self._config.block_size} tokens, "
            f"and the cache has {self.pool.num_blocks}",
        )

    def _room(self, sequence: Sequence) -> int:
        """Tokens the sequence can still compute in its own blocks and all free ones."""
        if not self._reach.num_least:
            return self._config.max_batch_tokens
        num_blocks = len(sequence.blocks) + self.pool.num_free
        return num_blocks * self._config.block_size - sequence.num_computed
