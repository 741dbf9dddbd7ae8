"""One request while it is being computed: its ids, how far it has come, the blocks it owns.

The scheduler owns and changes it; everyone else reads. It knows no queue and no tensor.
"""

from dataclasses import dataclass, field

from model.grammar import Matcher
from model.request import Finish, FinishReason, Request, SamplingParams
from model.sampling.seen import Seen

HOLE = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """`output_ids` may hold ids from the start, when another worker began the request.

    `num_computed` counts the first tokens, of prompt and output together, whose keys and values are in `blocks`, or
    were: a block that no later token needs is given back and leaves a hole, HOLE, in its place.
    What draws nothing ends when all of it is computed. What `is_whole` is computed in one step, and keeps no blocks.
    `num_pending` is 1 while an id has been drawn, or is about to be, that the host has not seen yet.
    """

    request: Request
    max_model_len: int
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_slid: int = 0  # first blocks of which all are holes but `held_back`
    held_back: list[int] = field(default_factory=list)  # places in `blocks`
    slot: int = -1  # while it runs: a number that no other running sequence has
    num_pending: int = 0
    arrival: int = 0  # number of sequences added before this one
    branch: int = 0  # of sequences that came as one: which
    matcher: Matcher | None = None  # of a request with a grammar: knows the output's ids
    names: list[bytes] = field(default_factory=list)  # of its first full blocks, as far as anybody asked
    num_cached: int = 0  # prompt tokens that were found, not computed, when they were first needed
    num_seen: int = -1  # tokens that were in blocks before a preemption; -1 = it has never run
    is_whole: bool = False
    # Of the request; not properties, since the scheduler asks for them many times in each step.
    id: str = field(init=False)
    num_prompt: int = field(init=False)
    seen: Seen | None = field(init=False)  # for penalties; None: there are none, or beams change the output
    num_source: int = field(init=False)  # tokens that its first chunk costs beside its own, in each slot anew
    draws: bool = field(init=False)
    shares: bool = field(init=False)  # its beginning may be found, rather than computed: not all rows are looked at

    def __post_init__(self) -> None:
        self.id, self.num_prompt = self.request.id, len(self.request.prompt_ids)
        self.seen = Seen(self.request.prompt_ids) if _counts_ids(self.request.sampling) else None
        self.num_source = len(self.request.source_ids)
        self.draws = self.request.task == "generate"
        self.shares = not self.is_whole and (self.draws or self.request.pooling in ("", "last"))

    @property
    def num_total(self) -> int:
        """Tokens of prompt and output, a pending one included."""
        return self.num_prompt + len(self.output_ids) + self.num_pending

    @property
    def gap(self) -> int:
        """Tokens known but not computed. Computing the last of them gives the next one."""
        return self.num_prompt + len(self.output_ids) + self.num_pending - self.num_computed

    @property
    def cost(self) -> int:
        """Tokens that closing the gap takes of a step's budget."""
        return self.gap if self.num_computed else self.gap + self.num_source

    @property
    def rank(self) -> tuple[int, int, int]:
        """Smaller is served first and preempted last."""
        return self.request.priority, self.arrival, self.branch

    @property
    def num_owned(self) -> int:
        """Blocks that it has: all but the holes."""
        return len(self.blocks) - self.num_slid + len(self.held_back)

    def owned(self) -> list[int]:
        """These blocks."""
        return [block for block in self.blocks if block != HOLE] if self.num_slid else self.blocks

    def ids(self, start: int, stop: int) -> list[int]:
        """Ids at positions `start` .. `stop` - 1 of prompt and output; a pending one is missing at the end."""
        n = self.num_prompt
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return [*self.request.prompt_ids[start:stop], *self.output_ids[: max(0, stop - n)]]

    def end(self) -> Finish | None:
        """How the ids themselves end the sequence: its last one is a stop id, or there may be no more. None: go on."""
        if not self.draws:
            return None
        sampling = self.request.sampling
        # Before `min_tokens` a stop id can't be drawn, but it may stand in the output that another worker left.
        if self.output_ids and len(self.output_ids) > sampling.min_tokens:
            last = self.output_ids[-1]
            if last in sampling.stop_token_ids:
                return Finish(FinishReason.STOP, stop_reason=None if last in sampling.eos_ids else last)
        if len(self.output_ids) >= sampling.max_tokens or self.num_total >= self.max_model_len:
            return Finish(FinishReason.LENGTH)
        return None

    @property
    def at_its_end(self) -> bool:
        """The pending id is the last one there may be, whatever it is."""
        length = len(self.output_ids) + self.num_pending
        return self.num_pending > 0 and (
            length >= self.request.sampling.max_tokens or self.num_total >= self.max_model_len
        )


def _counts_ids(params: SamplingParams) -> bool:
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return penalised and params.beam_width == 1
