"""The routes whose answers are numbers: `/v1/embeddings` and `/classify`.

They go the way of every request: the same queue, limits, deadlines and idempotency keys. A handler says what is asked
and how it is answered; the order of things is in `answering.py`, rules are in `vector_asked.py` and `intake.py`.
"""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.http.answering import Answering, Order
from service.http.backend import Backend
from service.http.intake import Served
from service.http.openai_openapi import JSON, refusals
from service.http.openapi import problems, schema_of
from service.http.schemas import GenerateRequest
from service.http.vector_asked import SHARED, ClassifyRequest, EmbeddingRequest, classes, embeddings
from service.http.vector_reply import Classes, Embeddings
from service.metrics import Metrics

STATUSES = (400, 404, 409, 413, 415, 429, 499, 500, 503, 504)


class Counted(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class Vector(BaseModel):
    """One text's: numbers, or as base64 the bytes of float32 numbers, little-endian."""

    object: str
    index: int
    embedding: list[float] | str


class Vectors(BaseModel):
    """The answer of `/v1/embeddings`."""

    object: str
    data: list[Vector]
    model: str
    usage: Counted


class Labelled(BaseModel):
    """One text's likeliest label, and the probabilities of all labels."""

    index: int
    label: str
    probabilities: dict[str, float]


class Labels(BaseModel):
    """The answer of `/classify`."""

    id: str
    model: str
    created: int
    data: list[Labelled]
    usage: Counted


class VectorRoutes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._answering = Answering(backend, metrics)

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        for path, handler, schema, answer, refused, summary in (
            ("/v1/embeddings", self.embed, EmbeddingRequest, Vectors, refusals(*STATUSES), "Vectors of texts"),
            ("/classify", self.classify, ClassifyRequest, Labels, problems(*STATUSES, 422), "Labels of texts"),
        ):
            told: dict[str, Any] = {"openapi_extra": _takes(schema), "responses": {200: {"model": answer}, **refused}}
            router.add_api_route(path, handler, methods=["POST"], summary=summary, response_class=Response, **told)
        return router

    async def embed(self, request: Request) -> Response:
        """Vectors of length 1, one for each text."""
        return await self._answering.answer(request, _embeddings)

    async def classify(self, request: Request) -> Response:
        """The probabilities of the model's labels, for each text."""
        return await self._answering.answer(request, lambda data, served: Order(classes(data), Classes))


def _embeddings(data: object, served: Served) -> Order:
    asked, headers = embeddings(data, served)
    return Order(asked, Embeddings, headers=headers)


def _takes(schema: type[BaseModel]) -> dict[str, object]:
    """A body of the route's own fields and of those it shares with the native one."""
    own, native = schema_of(schema), schema_of(GenerateRequest)
    shared = {name: about for name, about in native["properties"].items() if name in SHARED}
    body = own | {"properties": own["properties"] | shared}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": body}}}}
