"""What one Locust process has for all its users: the server's facts, prompts, books, and the three kinds of visit.

A visit is what one client does: ask once on the native route or in a chat, or talk for some turns and think between
them. It knows no Locust user and no schedule.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gevent
from locust.env import Environment

from loadtests.load import wire
from loadtests.load.books import Books
from loadtests.load.prompts import TEXT, Prompts
from loadtests.load.records import Record
from loadtests.load.traces import Arrival
from loadtests.load.wire import Plan, Wire

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
RETURNS_AFTER_S = 0.3
Visit = Callable[[Wire, float | None, Arrival | None], None]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server tells of itself. `longest` is prompt and answer together, in tokens, where it is known."""

    name: str
    longest: int | None


class Stage:
    """`open` it before the first visit."""

    def __init__(self, environment: Environment) -> None:
        self.environment, self.books = environment, Books(environment)
        self.over_since_s: float | None = None  # monotonic: when it was said that the run ends
        self.facts, self.prompts = Facts("", None), Prompts(TEXT.read_text(encoding="utf-8"))
        self.rng = random.Random(1)
        self.visits: dict[str, Visit] = {"Generate": self.generate, "Chat": self.chat, "Conversation": self.converse}

    @property
    def options(self) -> Any:
        """Of the command line; a worker's come from its master."""
        return self.environment.parsed_options

    @property
    def is_millrace(self) -> bool:
        return bool(self.options.dialect == "millrace")

    @property
    def is_over(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.over_since_s is not None

    def connect(self, num_connections: int = 2) -> Wire:
        """A client of its own."""
        return Wire(str(self.environment.host), num_connections, self.options.api_key or None)

    def open(self) -> None:
        """Ask the server for its model, and how it counts. Raises `RuntimeError` and `OSError`."""
        index = getattr(self.environment.runner, "worker_index", 0)
        self.rng, self.over_since_s = random.Random(f"{self.options.draw} {index}"), None
        client = self.connect()
        told = client.ask("/v1/models")["data"][0]
        self.facts = Facts(self.options.served_model or told["id"], self.options.longest or told.get("max_model_len"))
        if self.is_millrace:
            text = TEXT.read_text(encoding="utf-8")
            self.prompts = Prompts(text, self._ids(client, text))
            self.prompts.counted(len(self._ids(client, self.prompts.sample())))
        else:
            sample = {"messages": [{"role": "user", "content": self.prompts.sample()}], "max_tokens": 1}
            self.prompts.counted(client.ask(CHAT, {"model": self.facts.name, **sample})["usage"]["prompt_tokens"])
        client.close()

    def _ids(self, client: Wire, text: str) -> list[int]:
        ids: list[int] = client.ask("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        return ids

    def drawn(self) -> Arrival:
        """Lengths as the options say, evenly spread."""
        return Arrival(
            0.0, self.rng.randint(*self.options.prompt_tokens), self.rng.randint(*self.options.output_tokens)
        )

    def generate(self, client: Wire, due_s: float | None, wished: Arrival | None) -> None:
        """One answer on the native route; where the server is another one, on completions."""
        wished = wished or self.drawn()
        path = GENERATE if self.is_millrace else COMPLETIONS
        prompt = self.prompts.ids(wished) if self.prompts.has_ids else self.prompts.text(wished)
        self._ask(client, "generate", path, {"prompt": prompt}, wished.num_output, due_s)

    def chat(self, client: Wire, due_s: float | None, wished: Arrival | None) -> None:
        """One answer in a chat."""
        wished = wished or self.drawn()
        messages = [{"role": "user", "content": self.prompts.text(wished)}]
        self._ask(client, "chat", CHAT, {"messages": messages}, wished.num_output, due_s)

    def converse(self, client: Wire, due_s: float | None, wished: Arrival | None) -> None:
        """Some turns, each with all that was said before; it ends early when the server refuses or the run is over."""
        messages, num_turns = list[dict[str, str]](), self.rng.randint(*self.options.turns)
        for turn in range(num_turns):
            wished = wished if wished is not None and not turn else self.drawn()
            messages.append({"role": "user", "content": self.prompts.text(wished)})
            body = {"messages": messages}
            record, text = self._ask(client, "conversation", CHAT, body, wished.num_output, None if turn else due_s)
            room = (self.facts.longest or 1 << 30) - record.num_prompt - record.num_output
            if record.is_error or self.is_over or turn + 1 == num_turns or room < self._longest_turn():
                return
            messages.append({"role": "assistant", "content": text})
            gevent.sleep(self.think_s())

    def _longest_turn(self) -> float:
        """Tokens that the next turn may take: texts are only about as long as was wished, and templates add to them."""
        num_prompt, num_output = self.options.prompt_tokens[1], self.options.output_tokens[1]
        return float(1.5 * num_prompt + num_output + 32)

    def think_s(self) -> float:
        """Seconds that a reader thinks: exponential."""
        mean_s = self.options.think_s
        return self.rng.expovariate(1 / mean_s) if mean_s else 0.0

    def _ask(
        self, client: Wire, kind: str, path: str, body: dict[str, Any], num_output: int, due_s: float | None
    ) -> tuple[Record, str]:
        leaves_after, returns_after_s = self._fate(num_output)
        asked = {"max_tokens": num_output, **body}
        if path != GENERATE:
            asked |= {"model": self.facts.name, "stream_options": {"include_usage": True}}
        if self.is_millrace or self.options.ignore_eos:
            asked["ignore_eos"] = True
        if returns_after_s is not None:
            asked["resumable"] = True
        reads = wire.native if path == GENERATE else wire.openai
        plan = Plan(kind, path, asked, reads, due_s, leaves_after, returns_after_s)
        record = plan.record()
        try:
            return record, client.exchange(plan, record)
        finally:
            self.books.note(record, path)

    def _fate(self, num_output: int) -> tuple[int | None, float | None]:
        """After how many tokens a client leaves, and after how long it is back. Only Millrace lets it come back."""
        fate = self.rng.random()
        leaves_after = self.rng.randint(1, max(1, num_output - 1))
        if fate < self.options.leave:
            return leaves_after, None
        if self.is_millrace and fate < self.options.leave + self.options.come_back:
            return leaves_after, RETURNS_AFTER_S
        return None, None
