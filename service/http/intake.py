"""From a checked body to frozen requests: the only validator after the schema, and the last.

It applies what depends on the served model (vocabulary, context length, defaults), tokenises, and fixes id, seed,
deadline and `max_tokens`, so that nothing after it fills in, clamps or drops. One thing is clamped, and here: a
`max_tokens` beyond the context means "until the context is full". It knows no HTTP and no shape of an answer.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from model.config import GenerationDefaults, Pooling
from model.grammar import GrammarError
from model.grammar_check import MAX_WAITING, GrammarCheck, TooManyTrials, of_lark, of_schema
from model.request import Grammar, Request, SamplingParams, Task, TextOptions, begun, child_seed
from model.tokenizer import Tokenizer
from service.errors import InvalidRequest, ModelNotFound, Overloaded, PromptTooLong, TaskNotSupported
from service.http.schemas import ALLOWED, GenerateRequest

MAX_INLINE_CHARS = 4096  # a longer prompt is tokenised in a thread; for a shorter one the way there costs more
GRAMMAR_RETRY_S = 5  # where too many are tried already
SEED_BITS = 53  # of a drawn seed: the largest integers that every JSON reader can hand back unharmed
# What a search does not heed: it follows the network's own log-probabilities, to one answer.
UNSEARCHED = (
    *("n", "logprobs", "stop", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("response_format", "regex", "grammar"),
)

NOTHING_DRAWN = SamplingParams(max_tokens=0)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Served:
    """The model that is served, as the door needs to know it, and for how long. `created` is when it was loaded, epoch
    seconds. A request that names no time gets `max_request_s`; one without a reader for `orphan_s` is given up."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    defaults: GenerationDefaults
    created: int
    orphan_s: float = 30.0
    max_request_s: float = 3600.0
    grammars: GrammarCheck = field(default_factory=GrammarCheck)
    start_id: int | None = None  # of a model that answers a prompt instead of going on with it: an answer's first id
    searches: bool = True  # beams
    tasks: tuple[str, ...] = ("generate", "embed")
    labels: tuple[str, ...] = ()
    hidden_size: int = 0  # numbers in an embedding
    pooling: Pooling = "last"


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: the tenant, and what the logs and traces of the request are to be found by."""

    tenant: str = "default"
    request_id: str = ""
    traceparent: str = ""


class Unwritten(Protocol):
    """A prompt that has yet to be made of what it is in, say, a conversation. `num_chars` is about how long it is."""

    @property
    def num_chars(self) -> int: ...

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Raises `InvalidRequest`."""
        ...


Prompt = str | list[int] | Unwritten


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the terms of the native route, whatever the dialect it came in. `prompts` replace the body's where
    it is another, or there are several, each with `body.n` answers. `about` is for whoever writes the answer; `kind`
    begins the id."""

    body: GenerateRequest
    prompts: tuple[Prompt, ...] = ()
    about: str = ""
    kind: str = "gen-"
    task: Task = "generate"
    pooling: Pooling | Literal[""] = ""


@dataclass(frozen=True, slots=True)
class Intake:
    """One client's request: as many sequences as answers were asked for. All that an answer says of it is read off the
    sequences, so that one that comes out of the broker looks like the one that went in."""

    group: tuple[Request, ...]

    @property
    def id(self) -> str:
        """The one that the client knows."""
        return self.group[0].group

    @property
    def model(self) -> str:
        """Its name, as served when the request came."""
        return self.group[0].model

    @property
    def created(self) -> int:
        """Epoch seconds."""
        return int(self.group[0].created_s)

    @property
    def most_tokens(self) -> int:
        """What it can take at most, each prompt counted once."""
        first = self.group[0]
        prompts = self.group[:: first.num_choices // first.num_prompts]
        return sum(len(each.asked_ids) for each in prompts) + sum(each.sampling.max_tokens for each in self.group)

    @property
    def seed(self) -> int:
        """The first answer's; the others' are made from it."""
        return self.group[0].sampling.seed


async def take_in(asked: Asked, served: Served, client: Client = Client()) -> Intake:  # frozen
    """Raises `ModelNotFound`, `TaskNotSupported`, `InvalidRequest`, `PromptTooLong`, and `Overloaded` where too many
    grammars are tried."""
    body = asked.body
    if body.model not in (None, served.name):
        raise ModelNotFound(str(body.model), served.name)
    if asked.task not in served.tasks:
        raise TaskNotSupported(asked.task, served.name, served.tasks)
    now_s = time.time()
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    grammar = await _grammar(body, served)
    sequences: list[tuple[tuple[int, ...], tuple[int, ...], SamplingParams]] = []
    for prompt in asked.prompts or (body.prompt,):
        prompt_ids, source_ids = begun(await _prompt_ids(prompt, asked, served), served.start_id)
        if grammar is not None and served.tokenizer.detokenizer(prompt_ids).flush():
            raise InvalidRequest("prompt", prompt, "with a grammar, ids that do not end in the middle of a character")
        room = served.max_model_len - len(prompt_ids)
        sampling = _sampling(body, served, seed, room) if asked.task == "generate" else [NOTHING_DRAWN]
        sequences += [(prompt_ids, source_ids, each) for each in sampling]
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    id = asked.kind + secrets.token_hex(16)
    num_choices = len(sequences)
    group = tuple(
        Request(
            id=f"{id}.{i}" if num_choices > 1 else id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            text=TextOptions(stop=stop, echo=body.echo),
            grammar=grammar,
            model=served.name,
            tenant=client.tenant,
            priority=body.priority,
            created_s=now_s,
            deadline_s=now_s + _given(body.timeout_s, served.max_request_s),
            queue_deadline_s=None if body.queue_timeout_s is None else now_s + body.queue_timeout_s,
            orphan_s=None if body.background else served.orphan_s,
            num_choices=num_choices,
            num_prompts=len(asked.prompts) or 1,
            about=asked.about,
            request_id=client.request_id,
            traceparent=client.traceparent,
            cache_salt=body.cache_salt or "",
            source_ids=source_ids,
            task=asked.task,
            pooling=asked.pooling,
        )
        for i, (prompt_ids, source_ids, sampling) in enumerate(sequences)
    )
    return Intake(group)


async def _prompt_ids(prompt: Prompt, asked: Asked, served: Served) -> tuple[int, ...]:
    body, draws = asked.body, asked.task == "generate"
    encode, field = served.tokenizer.encode, "prompt" if draws else "input"
    limit = served.max_model_len - draws  # one token at least must be generated
    if isinstance(prompt, list):
        ids = prompt
    elif not isinstance(prompt, str):
        is_short = prompt.num_chars <= MAX_INLINE_CHARS
        ids = prompt.encode(served.tokenizer) if is_short else await asyncio.to_thread(prompt.encode, served.tokenizer)
    elif len(prompt) <= MAX_INLINE_CHARS:
        ids = encode(prompt, special=True)
    else:
        ids = await asyncio.to_thread(encode, prompt, special=True)
    if len(ids) > limit:
        if body.on_overflow == "reject":
            raise PromptTooLong(len(ids), limit)
        room = min(body.max_tokens, served.max_model_len // 2) if served.start_id is None else 1
        ids = ids[-max(1, served.max_model_len - room) :]
    if not ids:
        raise InvalidRequest(field, prompt, "text that makes at least one token")
    _check_ids(field, ids, served)
    return tuple(ids)


async def _grammar(body: GenerateRequest, served: Served) -> Grammar | None:
    """What the output is held to, once it is known that it can be."""
    wanted: dict[str, Callable[[], Grammar]] = {}
    if (form := body.response_format) is not None and form.type != "text":
        schema = form.json_schema
        wanted["response_format"] = lambda: of_schema(schema.body) if schema else Grammar("json_object")
    if (regex := body.regex) is not None:
        wanted["regex"] = lambda: Grammar("regex", regex)
    if (lark := body.grammar) is not None:
        wanted["grammar"] = lambda: of_lark(lark)
    if not wanted:
        return None
    field, make = wanted.popitem()
    value = body.model_dump(include={field}, by_alias=True)[field]
    if wanted:
        raise InvalidRequest(field, value, f"nothing beside {next(iter(wanted))}: one of them at a time")
    try:
        grammar = make()
        against = await asyncio.wrap_future(served.grammars.submit(grammar))
    except GrammarError as error:
        against = str(error)
    except TooManyTrials:
        raise Overloaded(GRAMMAR_RETRY_S, MAX_WAITING) from None
    if against:
        raise InvalidRequest(field, value, against)
    return grammar


def _sampling(body: GenerateRequest, served: Served, seed: int, room: int) -> list[SamplingParams]:
    """The sampling parameters of each answer to one prompt; they differ by seed only."""
    defaults = served.defaults
    bias = tuple((int(key), float(value)) for key, value in (body.logit_bias or {}).items())
    stop_ids = body.stop_token_ids or []
    _check_ids("logit_bias", [key for key, _ in bias], served)
    _check_ids("stop_token_ids", stop_ids, served)
    if body.min_tokens > body.max_tokens:
        raise InvalidRequest("min_tokens", body.min_tokens, f"an integer from 0 to max_tokens, {body.max_tokens}")
    if body.beam_width > 1:
        _check_search(body, served)
    eos_ids = () if body.ignore_eos else served.eos_ids
    return [
        SamplingParams(
            temperature=_given(body.temperature, defaults.temperature),
            top_k=_given(body.top_k, defaults.top_k),
            top_p=_given(body.top_p, defaults.top_p),
            min_p=_given(body.min_p, defaults.min_p),
            repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            seed=child_seed(seed, index),
            max_tokens=min(body.max_tokens, room),
            min_tokens=min(body.min_tokens, room),
            stop_token_ids=tuple(dict.fromkeys((*eos_ids, *stop_ids))),
            eos_ids=eos_ids,
            beam_width=body.beam_width,
            length_penalty=body.length_penalty if body.beam_width > 1 else 1.0,
            num_logprobs=body.logprobs,
        )
        for index in range(body.n)
    ]


def _check_search(body: GenerateRequest, served: Served) -> None:
    """Raises `InvalidRequest` for a search that is asked for what it does not heed, or of a model that can't."""
    if not served.searches:
        raise InvalidRequest("beam_width", body.beam_width, f"1: not all layers of {served.name} keep what beams share")
    for name in UNSEARCHED:
        if getattr(body, name) != GenerateRequest.model_fields[name].default:
            raise InvalidRequest("beam_width", body.beam_width, f"1 where {name} is given")


def _check_ids(field: str, ids: list[int], served: Served) -> None:
    if ids and max(ids) >= served.vocab_size:
        allowed = ALLOWED.get(field, "token ids of the vocabulary")
        raise InvalidRequest(field, max(ids), f"{allowed}; the vocabulary is 0 to {served.vocab_size - 1}")


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value
