"""What goes into the native route, as a schema: types and bounds that need no model to be checked.

It is strict: a wrong type, an unknown field or a number that is not finite is refused, never converted. What depends on
the model (vocabulary, context length) is checked in `intake.py`. Every description ends with `Allowed: ...`, which
errors quote.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model.grammar_check import MAX_GRAMMAR_CHARS, MAX_REGEX_CHARS

MAX_STOP_STRINGS, MAX_STOP_CHARS, MAX_STOP_IDS, MAX_BIASES = 16, 256, 64, 300
MAX_SALT_CHARS = 256
MAX_COUNT = 2**31 - 1


def _field(default: object, about: str, allowed: str, **bounds: Any) -> Any:
    return Field(default, description=f"{about}. Allowed: {allowed}", **bounds)


def _number(default: float | None, about: str, low: float, high: float) -> Any:
    return _field(default, about, f"a number from {low} to {high}", ge=low, le=high)


def _number_above(default: float | None, about: str, low: float, high: float) -> Any:
    return _field(default, about, f"a number above {low}, to {high}", gt=low, le=high)


def _integer(default: int | None, about: str, low: int, high: int) -> Any:
    return _field(default, about, f"an integer from {low} to {high}", ge=low, le=high)


def _switch(about: str) -> Any:
    return _field(False, about, "true or false")


def _few_biases(value: object) -> object:
    """Before every key is looked at: a million bad keys would make a million errors."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError("too many")
    return value


TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Prompt = Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
StopIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)]
BiasKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[BiasKey, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_few_biases)]


class JsonSchema(BaseModel):
    """As OpenAI has it. Output is always held to the schema, so `strict` changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field("schema", max_length=64)
    description: str | None = Field(None, max_length=4096)
    body: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """As OpenAI has it. `json_schema` belongs to the type of that name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type of that name")
        return self


class GenerateRequest(BaseModel):
    """The body of `POST /generate`. Sampling settings that are absent or null are the model's own defaults."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    prompt: Prompt = Field(
        description="What to continue: text, to which the tokenizer's special tokens are added, or token ids, taken as "
        "they are. Allowed: a non-empty string or a non-empty list of token ids of the vocabulary"
    )
    model: str | None = _field(
        None, "The model to use", "the name of the served model, or absent", min_length=1, max_length=200
    )
    max_tokens: int = _integer(
        128, "Most tokens to generate; where the context is full, generation ends earlier, as `length`", 1, MAX_COUNT
    )
    min_tokens: int = _integer(0, "Tokens before which nothing stops it; at most `max_tokens`", 0, MAX_COUNT)
    temperature: float | None = _number(None, "0 is greedy, 1 as trained, more is wilder", 0, 2)
    top_k: int | None = _integer(None, "Draw from the k likeliest tokens; 0 is off", 0, MAX_COUNT)
    top_p: float | None = _number_above(None, "Draw from the likeliest tokens that make up this probability", 0, 1)
    min_p: float | None = _number(None, "Leave out tokens less likely than this share of the likeliest", 0, 1)
    repetition_penalty: float | None = _number(None, "Makes tokens that occurred less likely; 1 is off", 0.01, 10)
    presence_penalty: float = _number(0.0, "Taken off the logit of every token generated so far", -2, 2)
    frequency_penalty: float = _number(0.0, "Taken off for each time that a token was generated", -2, 2)
    logit_bias: Biases | None = _field(
        None,
        "Added to the logits of tokens, by token id",
        f"at most {MAX_BIASES} token ids of the vocabulary as plain decimal strings, each with a number from -100 to "
        "100",
    )
    seed: int | None = _integer(
        None,
        "The same request with the same seed gives the same tokens; drawn if absent, always returned",
        0,
        2**63 - 1,
    )
    stop: StopString | StopStrings | None = _field(
        None,
        "Text that ends the answer and is not part of it",
        f"a string, or at most {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_CHARS} characters",
    )
    stop_token_ids: StopIds | None = _field(
        None,
        "Tokens that end the answer, beside the model's own",
        f"at most {MAX_STOP_IDS} token ids of the vocabulary",
    )
    response_format: ResponseFormat | None = _field(
        None,
        "What the answer must be. At most one of this, `regex` and `grammar`",
        '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}',
    )
    regex: str | None = _field(
        None,
        "A regular expression that the whole answer matches",
        f"1 to {MAX_REGEX_CHARS} characters, without look-around and back-references",
        min_length=1,
        max_length=MAX_REGEX_CHARS,
    )
    grammar: str | None = _field(
        None,
        "A grammar in Lark's words that the whole answer follows, from its rule `start`",
        f"1 to {MAX_GRAMMAR_CHARS} characters",
        min_length=1,
        max_length=MAX_GRAMMAR_CHARS,
    )
    ignore_eos: bool = _switch("Go on after the model's own end-of-sequence tokens")
    logprobs: int | None = _integer(None, "Tell log-probabilities: of the drawn token and the k likeliest", 0, 20)
    n: int = _integer(1, "How many answers; the first has the given seed, the others seeds made from it", 1, 8)
    stream: bool = _switch("Answer with server-sent events, one for each token")
    progress: bool = _switch(
        "While there is no token yet, tell the place in the queue and how far the prompt has come, as comments in the "
        "stream. Only with `stream`"
    )
    echo: bool = _switch("Begin the text with the prompt's; log-probabilities are of generated tokens all the same")
    timeout_s: float | None = _number_above(
        None, "End as `timeout` after so long, waiting included; absent is the server's own limit", 0, 86400
    )
    queue_timeout_s: float | None = _number_above(None, "End as `timeout` if it still waits after so long", 0, 86400)
    priority: int = _integer(
        0, "One of two: -1 goes ahead of the others, until those have waited long; 0 is the usual one", -1, 0
    )
    cache_salt: str | None = _field(
        None,
        "What is computed for this prompt is used again only by requests with the same one; without it, by all of the "
        "same key",
        f"a string of 1 to {MAX_SALT_CHARS} characters",
        min_length=1,
        max_length=MAX_SALT_CHARS,
    )
    on_overflow: Literal["reject", "truncate_left"] = _field(
        "reject",
        "What to do with a prompt that fills the context",
        "reject, or truncate_left to keep its end and leave room for max_tokens, at most half of the context",
    )
    resumable: bool = _switch(
        "Go on when the client leaves: it can be read again by its id, and is cancelled when nobody has for a while"
    )
    background: bool = _switch(
        "Answer at once with the id and the URL to read it at; it needs no reader. Not with `stream`"
    )


ALLOWED = {
    name: (field.description or "").rpartition("Allowed: ")[2] for name, field in GenerateRequest.model_fields.items()
}
