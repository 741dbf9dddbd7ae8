"""What a client saw of one request, raw: nothing is rounded or put into buckets before the end.

A record is a line of JSON in a file, so that a run can be looked at again. It knows no server and no statistics.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

OK, LEFT = "ok", "left"  # outcomes; every other one is an error, in words


@dataclass(slots=True)
class Record:
    """Times of day are seconds since 1970; durations are of a monotonic clock. `due_s` is when it should have been
    sent, which in a closed loop is when it was. `ttft_s` counts from sending to the first token with text or an id,
    `gaps_s` are those between tokens, until the client went away on purpose if it did."""

    kind: str
    due_s: float
    sent_s: float
    ttft_s: float | None = None
    e2e_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_output: int = 0
    outcome: str = OK
    num_returns: int = 0  # how often it came back with a Last-Event-ID

    @property
    def late_s(self) -> float:
        """How late the client was: if this is not small, the client is what was measured."""
        return self.sent_s - self.due_s

    @property
    def felt_ttft_s(self) -> float | None:
        """The wait for the first token from when the request was due."""
        return None if self.ttft_s is None else self.late_s + self.ttft_s

    @property
    def is_error(self) -> bool:
        return self.outcome not in (OK, LEFT)

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first one, as vLLM's benchmark has it; None for answers of one token."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else None


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append."""
    with path.open("ab") as lines:
        lines.writelines(orjson.dumps(record) + b"\n" for record in records)


def read(path: Path) -> list[Record]:
    """All of a file, in the order of sending."""
    with path.open("rb") as lines:
        return sorted((Record(**orjson.loads(line)) for line in lines), key=lambda record: record.sent_s)


def as_dict(record: Record) -> dict[str, Any]:
    """For a line of JSON, or the way to a master."""
    return asdict(record)
