"""Where each head looked, for the chat page: `/attention`, on a server that was started with `--attention-view`.

A pass over at most 512 tokens, computed anew beside the engine, in one thread of the lowest priority. The key's limits
hold as for any request. It knows no network: the composition root brings the function that computes.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.errors import InvalidRequest, Overloaded, RequestNotFound
from service.http.backend import Backend
from service.http.body import check, read_json
from service.http.limits import VISIT, Visit
from service.http.openapi import problems, schema_of
from service.http.schemas import TokenId

MOST_TOKENS, MOST_WAITING = 512, 4
RETRY_S = 2  # where so many wait
LOWEST = 19
ALLOWED_IDS = f"a list of 1 to {MOST_TOKENS} token ids of the vocabulary"

Look = Callable[[list[int]], list[list[list[float]]]]
"""Token ids -> by layer, by head: how much the last token takes of each."""


class AttentionRequest(BaseModel):
    """The body of `POST /attention`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)] = Field(
        description=f"A text; its last token is the one that looks. Allowed: {ALLOWED_IDS}"
    )


class Looked(BaseModel):
    """The answer: by layer and by head, how much the last token took of each, and the tokens' texts."""

    tokens: list[str]
    weights: list[list[list[float]]]


class AttentionRoutes:
    """Handlers over one backend, and their thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._num_waiting = backend, 0
        self._thread = ThreadPoolExecutor(1, "attention", initializer=_step_back)

    def router(self) -> APIRouter:
        """The one route, with what OpenAPI should say of it."""
        router = APIRouter()
        body = {"required": True, "content": {"application/json": {"schema": schema_of(AttentionRequest)}}}
        about: dict[str, Any] = {"openapi_extra": {"requestBody": body}, "response_class": Response}
        about["responses"] = {200: {"model": Looked}, **problems(400, 404, 413, 415, 422, 429, 500, 503)}
        router.add_api_route("/attention", self.look, methods=["POST"], summary="Where each head looked", **about)
        return router

    async def look(self, request: Request) -> Response:
        """At most a few wait: it is for people who click."""
        served, _ = self._backend.get()
        visit: Visit | None = request.scope.get(VISIT)
        if visit is not None:
            visit.enter()
        look = self._backend.look
        if look is None:
            raise RequestNotFound("this server was started without --attention-view")
        ids = check(AttentionRequest, await read_json(request), {"token_ids": ALLOWED_IDS}).token_ids
        if max(ids) >= served.vocab_size:
            raise InvalidRequest("token_ids", max(ids), f"{ALLOWED_IDS}, which is 0 to {served.vocab_size - 1}")
        if visit is not None:
            visit.reserve(len(ids))
            visit.used = lambda: len(ids)
        if self._num_waiting >= MOST_WAITING:
            raise Overloaded(RETRY_S, self._num_waiting)
        self._num_waiting += 1
        try:
            weights = await asyncio.get_running_loop().run_in_executor(self._thread, look, ids)
        finally:
            self._num_waiting -= 1
        told = {"tokens": [served.tokenizer.token_text(token_id) for token_id in ids], "weights": weights}
        return Response(orjson.dumps(told), media_type="application/json")


def _step_back() -> None:
    """Everything else goes first. Where threads have no priority of their own, this one is like the others."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
