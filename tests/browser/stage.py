"""A server for the chat page that does as it is told: the product's door over a broker that says a text, letter by
letter, at a pace, and waits where a test wants it to. In a thread of the test's process, behind a proxy that can fail.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import uvicorn
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from model.request import Finish, TokenLogprob
from model.tokenizer import Tokenizer
from service.broker.base import CANCELLED, Entry, Glance
from service.http.app import create_app
from service.http.attention_routes import Look
from service.http.backend import Backend
from service.http.gate import Rules
from service.metrics import Metrics
from tests.service.helpers_http import SERVED, STOP, TIMINGS, FakeBroker

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def chatty_tokenizer() -> Tokenizer:
    """256 ids, one for each byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library, {"chat_template": TEMPLATE})


TOKENIZER = chatty_tokenizer()


@dataclass
class Reciter(FakeBroker):
    """Says `text` to whoever asks, `pace_s` between letters, once `go` is set; `position` wait before everybody."""

    text: str = "hello"
    pace_s: float = 0.002
    go: threading.Event = field(default_factory=threading.Event)
    forgets: bool = False

    async def follow(self, id: str, tenant: str, after: int = 0) -> AsyncIterator[Entry]:
        while not self.go.is_set() and id not in self.cancelled:  # noqa: ASYNC110  # set in another thread
            await asyncio.sleep(0.01)
        for entry in self._entries():
            if id in self.cancelled:
                yield Entry(entry.start, finish=CANCELLED, timings=TIMINGS)
                return
            yield entry
            await asyncio.sleep(self.pace_s)

    async def peek(self, id: str, tenant: str) -> Glance:
        return Glance(Entry(0), position=None if self.go.is_set() else self.position)

    def _entries(self) -> Iterator[Entry]:
        ids = TOKENIZER.encode(self.text)
        for start, token_id in enumerate(ids):
            finish: Finish | None = STOP if start == len(ids) - 1 else None
            odds = TokenLogprob(-0.5, ((token_id, -0.5), (ids[0], -2.0)))
            yield Entry(start, (token_id,), (odds,), finish, TIMINGS if finish else None)


class _Quiet(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def stage(
    broker: Reciter, rules: Rules | None = None, max_model_len: int = 4096, look: Look | None = None
) -> Iterator[int]:
    """Serve the page over `broker`, on the port that this yields."""
    backend, metrics = Backend(facts=lambda: {"attention_view": True} if look else {}), Metrics()
    backend.look = look
    served = replace(SERVED, tokenizer=TOKENIZER, max_model_len=max_model_len, eos_ids=())
    backend.loaded(served, broker)
    app = create_app(backend, metrics, rules=rules) if rules else create_app(backend, metrics)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Quiet(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="stage")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
