"""What comes out of the native route, as schemas. They only document it for OpenAPI: `reply.py` writes it."""

from typing import Literal

from pydantic import BaseModel


class Logprobs(BaseModel):
    """As OpenAI's completions have them, for generated tokens only. Offsets are characters into `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]]
    text_offset: list[int]


class Choice(BaseModel):
    """One answer. `stop_reason` is the stop string or stop token that was hit, null for the model's own end."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "cancelled", "timeout", "error"] | None
    stop_reason: str | int | None


class Usage(BaseModel):
    """The prompt counts once, however many answers; generated tokens are those of all answers, stop tokens included.
    `cached_tokens` are those of the prompt that were not computed, since an earlier request began with them; 0 where
    the end did not come from the model."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class Timings(BaseModel):
    """Seconds from submission to the first claim, the first token and the end; null where it came to no such moment. Of
    several answers the earliest claim, the earliest token and the latest end."""

    queue_s: float | None
    ttft_s: float | None
    total_s: float | None


class GenerateAnswer(BaseModel):
    """The answer, and in the same shape each event of a stream: `usage` and `timings` are in the last one only. That
    one's `text` is what was held back until the end, as the possible beginning of a stop string."""

    id: str
    model: str
    created: int
    seed: int
    choices: list[Choice]
    usage: Usage
    timings: Timings


class Submitted(BaseModel):
    """The answer to a request in the background: where to read it."""

    id: str
    url: str
    model: str
    created: int
    seed: int


class Cancelling(BaseModel):
    """The answer to a cancellation. What ends it is told by its stream, and may have been something else before."""

    id: str
    status: Literal["cancelling"]


class Problem(BaseModel):
    """An error (RFC 9457). `errors` names fields; an overlong prompt is told by `num_prompt_tokens` and `limit`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[dict[str, str]] | None = None
    num_prompt_tokens: int | None = None
    limit: int | None = None
    num_waiting: int | None = None
    position: int | None = None
    retry_after_s: int | None = None
