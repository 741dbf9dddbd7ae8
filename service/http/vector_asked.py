"""What `/v1/embeddings` and `/classify` take, as schemas, and what their bodies ask for in the native route's terms.

An embedding's body is lenient, as OpenAI's clients send what they like; a classification's is strict, as the native
routes are. Both name texts as `input`, one or many, each a string or token ids. It knows no answer.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.config import Pooling
from service.errors import InvalidRequest
from service.http.body import check
from service.http.intake import Asked, Prompt, Served
from service.http.openai_asked import NOWHERE, read_body
from service.http.openai_schemas import Lenient
from service.http.problems import InvalidFields
from service.http.schemas import ALLOWED, MAX_COUNT, GenerateRequest, TokenId

EMBEDDING, CLASSES = "embd-", "class-"  # how ids begin
MAX_INPUTS = 2048  # OpenAI's
SHARED = frozenset({"model", "timeout_s", "queue_timeout_s", "priority", "cache_salt"})  # with the native route
ALLOWED_INPUT = f"a non-empty string, a non-empty list of token ids of the vocabulary, or a list of 1 to {MAX_INPUTS} "
ALLOWED_INPUT += "of either"

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Input = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(Lenient):
    """The body of `POST /v1/embeddings`. Vectors have length 1."""

    input: Input = Field(description=f"What to make vectors of. Allowed: {ALLOWED_INPUT}")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or the bytes of float32 numbers, little-endian. Allowed: float or base64"
    )
    dimensions: int | None = Field(
        None,
        description="How many numbers a vector has. Allowed: the model's own number, or absent",
        ge=1,
        le=MAX_COUNT,
    )
    pooling: Pooling | None = Field(
        None,
        description="Which tokens' vectors are the text's: the last one's, the mean of all, or an encoder's first. "
        "Allowed: last, mean or cls; absent is the model's own",
    )
    user: str | None = Field(None, description="Changes nothing. Allowed: a string")


class ClassifyRequest(BaseModel):
    """The body of `POST /classify`, beside what it shares with the native route."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    input: Input = Field(description=f"What to label. Allowed: {ALLOWED_INPUT}")


def embeddings(data: object, served: Served) -> tuple[Asked, dict[str, str]]:
    """What such a body asks for, and the headers of the answer. Raises `InvalidRequest` and `InvalidFields`."""
    try:
        body, shared, headers = read_body(EmbeddingRequest, data, SHARED, {})
    except InvalidFields as error:  # of an input's kinds nobody knows which was meant, so it is told as a whole
        raise InvalidFields([_whole(each, data) for each in error.errors]) from None
    if body.dimensions not in (None, served.hidden_size):
        allowed = f"{served.hidden_size}, or absent: a part of this model's vectors means nothing"
        raise InvalidRequest("dimensions", body.dimensions, allowed)
    if body.pooling == "cls" and "generate" in served.tasks:
        raise InvalidRequest("pooling", "cls", "last or mean: a decoder's first token has seen nothing of the text")
    native = check(GenerateRequest, {"prompt": NOWHERE, **shared}, ALLOWED)
    pooling = body.pooling or served.pooling
    return Asked(native, _texts(body.input), body.encoding_format, EMBEDDING, "embed", pooling), headers


def classes(data: object) -> Asked:
    """What such a body asks for. Raises `InvalidRequest` and `InvalidFields`."""
    own = {key: value for key, value in data.items() if key not in SHARED} if isinstance(data, dict) else data
    body = check(ClassifyRequest, own, {"input": ALLOWED_INPUT})
    shared = {key: data[key] for key in SHARED & data.keys()} if isinstance(data, dict) else {}
    native = check(GenerateRequest, {"prompt": NOWHERE, **shared}, ALLOWED)
    return Asked(native, _texts(body.input), "", CLASSES, "classify")


def _whole(refused: InvalidRequest, data: object) -> InvalidRequest:
    if refused.field.partition("[")[0] == "input" and isinstance(data, dict):
        return InvalidRequest("input", data.get("input"), ALLOWED_INPUT)
    return refused


def _texts(given: Input) -> tuple[Prompt, ...]:
    match given:
        case str():
            return (given,)
        case [int(), *_]:
            return ([each for each in given if isinstance(each, int)],)
    return tuple(each for each in given if not isinstance(each, int))
