"""The routes of OpenAI's completions, chat and models.

A handler says what is asked and how it is answered; the order of things is in `answering.py`, rules are in
`openai_asked.py` and `intake.py`. A stored request is read again under the route that made it, and nowhere else.
"""

from collections.abc import Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ModelNotFound, RequestNotFound
from service.http.answering import Answering, Order, Speak
from service.http.backend import Backend
from service.http.intake import Asked, Intake, Served
from service.http.openai_asked import CHAT, COMPLETION, chat, completion
from service.http.openai_openapi import CANCEL, MODEL, MODELS, READ, asks
from service.http.openai_reply import Chat, Completion
from service.http.openai_schemas import ChatRequest, CompletionRequest
from service.http.resume import reading
from service.http.stored import Stored
from service.metrics import Metrics


class OpenAIRoutes:
    """Handlers over one backend."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._answering, self._stored = Answering(backend, metrics), Stored(backend, metrics)

    def router(self) -> APIRouter:
        """The table of routes, with what OpenAPI should say of them."""
        router = APIRouter()
        add, completions, chats = router.add_api_route, "/v1/completions", "/v1/chat/completions"
        add(completions, self.complete, methods=["POST"], summary="Continue prompts", **asks(CompletionRequest))
        add(completions + "/{id}", self.read_completion, summary="Read a completion again", **READ)
        add(completions + "/{id}", self.cancel_completion, methods=["DELETE"], summary="Cancel a completion", **CANCEL)
        add(chats, self.chat, methods=["POST"], summary="Go on with a conversation", **asks(ChatRequest))
        add(chats + "/{id}", self.read_chat, summary="Read the answer of a chat again", **READ)
        add(chats + "/{id}", self.cancel_chat, methods=["DELETE"], summary="Cancel the answer of a chat", **CANCEL)
        add("/v1/models", self.models, summary="The served model", **MODELS)
        add("/v1/models/{id:path}", self.one_model, summary="The served model, by its name", **MODEL)
        return router

    async def complete(self, request: Request) -> Response:
        """Answer with JSON, or with a stream of chunks if `stream` is true. Refusals always have their own status."""
        return await self._answering.answer(request, _reads(completion, _completion))

    async def chat(self, request: Request) -> Response:
        """Answer with JSON, or with a stream of chunks if `stream` is true. Refusals always have their own status."""
        return await self._answering.answer(request, _reads(chat, _chat))

    async def read_completion(self, request: Request, id: str) -> Response:
        """The chunks after those that the client has, or all of it. To leave ends nothing."""
        _check_kind(id, COMPLETION)
        return await self._stored.read(request, id, lambda intake: reading(request, intake), _completion)

    async def read_chat(self, request: Request, id: str) -> Response:
        """The chunks after those that the client has, or all of it. To leave ends nothing."""
        _check_kind(id, CHAT)
        return await self._stored.read(request, id, lambda intake: reading(request, intake), _chat)

    async def cancel_completion(self, request: Request, id: str) -> Response:
        """Wherever it is."""
        return await self._cancel(request, id, COMPLETION)

    async def cancel_chat(self, request: Request, id: str) -> Response:
        """Wherever it is."""
        return await self._cancel(request, id, CHAT)

    async def models(self) -> Response:
        """A list of one."""
        served, _ = self._backend.get()
        return JSONResponse({"object": "list", "data": [_card(served)]})

    async def one_model(self, id: str) -> Response:
        """What the list has."""
        served, _ = self._backend.get()
        if id != served.name:
            raise ModelNotFound(id, served.name)
        return JSONResponse(_card(served))

    async def _cancel(self, request: Request, id: str, kind: str) -> Response:
        _check_kind(id, kind)
        await self._stored.cancel(request, id)
        return JSONResponse({"id": id, "status": "cancelling"}, 202)


def _reads(ask: Callable[[object], tuple[Asked, dict[str, str]]], speak: Speak) -> Callable[[object, Served], Order]:
    def read(data: object, served: Served) -> Order:
        asked, headers = ask(data)
        return Order(asked, speak, headers=headers)

    return read


def _completion(intake: Intake, served: Served) -> Completion:
    return Completion(intake, served.tokenizer)


def _chat(intake: Intake, served: Served) -> Chat:
    return Chat(intake, served.tokenizer)


def _check_kind(id: str, kind: str) -> None:
    """Raises `RequestNotFound` for one that another route has made: it can't be told in this one's words."""
    if not id.startswith(kind):
        raise RequestNotFound(f"no request {id[:80]} was made by this route; its ids begin with {kind}")


def _card(served: Served) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "millrace",
        "max_model_len": served.max_model_len,
    }
