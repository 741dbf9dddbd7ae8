"""The shared vocabulary: what is asked for and what comes back.

Every room speaks these words, so this one imports nothing of ours. All values are frozen: a `Request` is made once, at
the door, by the only validator, and nothing after that clamps, fills in or drops. Token ids are plain ints; times are
seconds, wall-clock ones since the epoch.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class FinishReason(StrEnum):
    """Why a request ended. Each means exactly itself: a timeout is never reported as a cancellation."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next id is drawn. Ranges are checked at the door; neutral values are the defaults.

    `stop_token_ids` holds every id that ends the sequence: intake has already added the model's end-of-sequence ids
    unless the client asked to ignore them. Until `min_tokens` ids are out, those ids cannot be drawn.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # 0 .. 2**63 - 1
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()  # those of stop_token_ids that are end-of-sequence: no stop_reason is told for them
    beam_width: int = 1  # above 1 nothing is drawn: of so many beginnings the likeliest go on
    length_penalty: float = 1.0  # of a search: its answers' log-probabilities are divided by length to this power
    num_logprobs: int | None = None  # None = no log-probabilities, k = the drawn id's and the k likeliest


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How ids become text. With the prompt and the output ids this determines every byte a client sees."""

    stop: tuple[str, ...] = ()
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must match. `text` is a JSON schema, a regular expression or a grammar in Lark's words; of
    `json_object`, which is any JSON object, it is empty. `model/grammar.py` says what is taken."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""


Task = Literal["generate", "embed", "classify"]
"""What is wanted of a sequence: more tokens; its vector; the probabilities of its labels. The last two draw nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to compute. A client's request with several choices is a group of these, `<group>.<i>`; of several
    prompts, those of the first prompt come first, and each prompt has as many.

    `orphan_s`: it is cancelled when nobody has followed it for so long; None = it needs no reader. `queue_deadline_s`
    counts until the first claim only. `pooling` says which rows an embedding is made of; "" is "last". `about` is for
    whoever writes the answer, and nobody else's business.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    text: TextOptions = field(default_factory=TextOptions)
    grammar: Grammar | None = None
    model: str = ""
    tenant: str = "default"
    priority: int = 0  # below 0: ahead of the others, until those have waited long
    created_s: float = 0.0
    deadline_s: float | None = None  # wall clock; None = no deadline
    queue_deadline_s: float | None = None  # wall clock
    orphan_s: float | None = None
    num_choices: int = 1
    num_prompts: int = 1
    about: str = ""
    request_id: str = ""  # of the HTTP request that brought it, for the logs
    traceparent: str = ""  # W3C Trace Context; "" = none
    cache_salt: str = ""  # requests share what is computed only within a tenant and a salt
    source_ids: tuple[int, ...] = ()  # of encoder-decoders: what is answered; `prompt_ids` are the answer's beginning
    task: Task = "generate"
    pooling: Literal["", "last", "mean", "cls"] = ""

    @property
    def asked_ids(self) -> tuple[int, ...]:
        """What the client sent: the text that is gone on with, or the source that is answered."""
        return self.source_ids or self.prompt_ids

    @property
    def group(self) -> str:
        """The id that the client knows."""
        return self.id if self.num_choices == 1 else self.id.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats) of the drawn id and of the likeliest ids, likeliest first, under the network's own
    distribution: before penalties, biases, temperature and truncation, so that it says what the network thinks."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended. `stop_reason` is the stop string or stop id that was hit, None for end-of-sequence."""

    reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request: ids from output position `start` on, and `finish` if it ended with them. One
    with neither says how far its prompt has come: `num_computed` tokens of it. With a `finish` comes how many of the
    prompt's tokens were found in the cache: `num_cached`; and where nothing was to be drawn the `result`: float32
    numbers, little-endian, of a vector of length 1 or of the labels' probabilities in their order."""

    id: str
    start: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # as many as token_ids, or none
    finish: Finish | None = None
    num_computed: int = 0
    num_cached: int = 0
    result: bytes = b""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as clients are told them; `cached_tokens` are those of the prompt that were found, not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def begun(ids: tuple[int, ...], start_id: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A request's `prompt_ids` and `source_ids`, so that `ids` are gone on with, or, by networks whose answers have a
    starting id, answered."""
    return (ids, ()) if start_id is None else ((start_id,), ids)


def child_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a group: choice 0 keeps the seed, so `n` never changes the first answer.

    The others step by an odd constant (the golden ratio of 2**63), modulo 2**63; the generator behind it mixes
    neighbouring seeds well, so a plain step is enough.
    """
    return (seed + index * 0x4F1BBCDCBFA53E0B) % 2**63
