"""What the model's tokenizer and chat template make of a text, for those who count and look: `/tokenize`,
`/detokenize`, `/apply-template`.

The fields are those of vLLM and of llama.cpp where the two agree in meaning, under either name. Nothing is generated
and nothing is queued. It knows no request.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, ModelNotFound
from service.http.backend import Backend
from service.http.body import check, read_json
from service.http.intake import Served
from service.http.openai_prompt import conversation
from service.http.openai_schemas import Messages, Tools
from service.http.openapi import problems, schema_of
from service.http.schemas import TokenId

MODEL = "The model to use. Allowed: the name of the served model, or absent"
ONE_OF = "either `prompt` or `content`, a string, or `messages`"


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str | None = Field(None, description=f"A text. Allowed: {ONE_OF}")
    content: str | None = Field(None, description=f"The same as `prompt`. Allowed: {ONE_OF}")
    messages: Messages | None = Field(None, description=f"A conversation. Allowed: {ONE_OF}")
    tools: Tools | None = Field(None, description="As in a chat. Allowed: a list of tools, with `messages`")
    add_special_tokens: bool = Field(
        True, description="Whether a text gets what a prompt gets around it. Allowed: true or false"
    )
    return_token_strs: bool = Field(False, description="Whether to tell the tokens' texts. Allowed: true or false")
    model: str | None = Field(None, description=MODEL, min_length=1, max_length=200)


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tokens: Annotated[list[TokenId], Field(fail_fast=True)] = Field(
        description="What to make text of. Allowed: a list of token ids of the vocabulary"
    )
    model: str | None = Field(None, description=MODEL, min_length=1, max_length=200)


class TemplateRequest(BaseModel):
    """The body of `POST /apply-template`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    messages: Messages = Field(description="A conversation. Allowed: a non-empty list of messages, as in a chat")
    tools: Tools | None = Field(None, description="As in a chat. Allowed: a list of tools")
    model: str | None = Field(None, description=MODEL, min_length=1, max_length=200)


class Tokenized(BaseModel):
    """The answer of `/tokenize`; `token_strs` only if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Written(BaseModel):
    """A text, under both names that clients know."""

    prompt: str
    content: str


Body = TypeVar("Body", TokenizeRequest, DetokenizeRequest, TemplateRequest)


class TextRoutes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        for path, handler, schema, answer, summary in (
            ("/tokenize", self.tokenize, TokenizeRequest, Tokenized, "The tokens of a text or a conversation"),
            ("/detokenize", self.detokenize, DetokenizeRequest, Written, "The text of tokens"),
            ("/apply-template", self.apply_template, TemplateRequest, Written, "A conversation as the model reads it"),
        ):
            router.add_api_route(path, handler, methods=["POST"], summary=summary, **_about(schema, answer))
        return router

    async def tokenize(self, request: Request) -> Response:
        """As a prompt would be tokenised."""
        return await self._answer(request, TokenizeRequest, _tokenized)

    async def detokenize(self, request: Request) -> Response:
        """Without control tokens, as in an answer."""
        return await self._answer(request, DetokenizeRequest, _detokenized)

    async def apply_template(self, request: Request) -> Response:
        """By the model's chat template, for people: the ids of a chat are made otherwise, so that no text in it can be
        a control token."""
        return await self._answer(request, TemplateRequest, _templated)

    async def _answer(
        self, request: Request, schema: type[Body], make: Callable[[Body, Served], dict[str, object]]
    ) -> Response:
        served, _ = self._backend.open()
        body = check(schema, await read_json(request), allowed(schema))
        if body.model not in (None, served.name):
            raise ModelNotFound(str(body.model), served.name)
        told = await asyncio.to_thread(lambda: orjson.dumps(make(body, served)))  # a text may be long
        return Response(told, media_type="application/json")


def allowed(schema: type[BaseModel]) -> dict[str, str]:
    """What errors quote, by field."""
    return {name: (field.description or "").rpartition("Allowed: ")[2] for name, field in schema.model_fields.items()}


def _tokenized(body: TokenizeRequest, served: Served) -> dict[str, object]:
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", " and ".join(given) or None, ONE_OF)
    if body.tools is not None and body.messages is None:
        raise InvalidRequest("tools", "a list", "absent without `messages`")
    if body.messages is not None:
        ids = conversation(body.messages, body.tools or ()).encode(served.tokenizer)
    else:
        ids = served.tokenizer.encode(body.prompt or body.content or "", special=body.add_special_tokens)
    told: dict[str, object] = {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids}
    if body.return_token_strs:
        told["token_strs"] = [served.tokenizer.token_text(token_id) for token_id in ids]
    return told


def _detokenized(body: DetokenizeRequest, served: Served) -> dict[str, object]:
    if body.tokens and max(body.tokens) >= served.vocab_size:
        raise InvalidRequest(
            "tokens", max(body.tokens), f"ids of the vocabulary, which is 0 to {served.vocab_size - 1}"
        )
    return _written(served.tokenizer.decode(body.tokens))


def _templated(body: TemplateRequest, served: Served) -> dict[str, object]:
    return _written(conversation(body.messages, body.tools or ()).write(served.tokenizer))


def _written(text: str) -> dict[str, object]:
    return {"prompt": text, "content": text}


def _about(schema: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema_of(schema)}}}
    return {
        "response_class": Response,
        "openapi_extra": {"requestBody": body},
        "responses": {200: {"model": answer}, **problems(400, 404, 413, 415, 422, 500, 503)},
    }
