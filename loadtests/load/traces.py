"""Published traces of requests: when each came, how long its prompt and its answer were, and what prompts share.

Two forms are read. Azure's (https://github.com/Azure/AzurePublicDataset, CC BY 4.0) is CSV with the columns TIMESTAMP,
ContextTokens and GeneratedTokens. Mooncake's (https://github.com/kvcache-ai/Mooncake, Apache-2.0) is a JSON object a
line, with `timestamp` in milliseconds, `input_length`, `output_length` and `hash_ids`: one number for each 512 tokens
of the prompt, equal where they and all before them are equal.

    python -m loadtests.load.traces FOLDER

writes the two synthetic traces that are kept beside this file, in the same forms. It knows nothing of servers.
"""

import csv
import datetime
import itertools
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HASHED = 512  # tokens that one of Mooncake's hashes stands for
NUM_SYNTHETIC, SYNTHETIC_S = 120, 60.0


class TraceError(ValueError):
    """A line that is not of its form: which, and what it holds."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. `at_s` counts from the trace's first. `hash_ids` name the prompt's blocks of `block`
    tokens; without them it shares nothing."""

    at_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()
    block: int = HASHED


def azure(lines: Iterable[str]) -> Iterator[Arrival]:
    """Azure's form. Raises `TraceError`."""
    first: datetime.datetime | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            came = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])  # it has seven decimals, this takes six
            first = first or came
            lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            yield Arrival((came - first).total_seconds(), *lengths)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"line {number} is not of Azure's form: {row}") from error


def mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    """Mooncake's form. Raises `TraceError`."""
    first_s: float | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            came_s = told["timestamp"] / 1000
            first_s = came_s if first_s is None else first_s
            ids = tuple(told["hash_ids"])
            yield Arrival(came_s - first_s, int(told["input_length"]), int(told["output_length"]), ids)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"line {number} is not of Mooncake's form: {line[:120]}") from error


def read(path: Path, most: int | None = None) -> list[Arrival]:
    """The trace in a file, by the file's form, or its first `most` requests. Raises `TraceError` and `OSError`."""
    form = azure if path.suffix == ".csv" else mooncake
    with path.open(encoding="utf-8") as lines:
        return list(itertools.islice(form(lines), most))


def smaller(arrival: Arrival, scale: int, longest: int | None = None) -> Arrival:
    """Lengths divided by `scale`, and cut so that prompt and answer together are at most `longest` tokens; a prompt
    keeps its beginning. Raises `ValueError` where `scale` does not divide a hashed block."""
    if arrival.hash_ids and arrival.block % scale:
        raise ValueError(f"scale: {scale} does not divide the {arrival.block} tokens that a hash stands for")
    num_prompt, num_output = max(1, arrival.num_prompt // scale), max(1, arrival.num_output // scale)
    if longest is not None:
        num_output = min(num_output, max(1, longest // 2))
        num_prompt = min(num_prompt, longest - num_output)
    return Arrival(arrival.at_s, num_prompt, num_output, arrival.hash_ids, max(1, arrival.block // scale))


def synthetic(seed: int = 7) -> list[Arrival]:
    """A minute of conversations that go on, made of nobody's data: gaps are exponential, lengths log-normal."""
    rng, talks, fresh, at_s, made = random.Random(seed), [[0]], itertools.count(1), 0.0, list[Arrival]()
    for _ in range(NUM_SYNTHETIC):
        talk = [*rng.choice(talks)[:6], *itertools.islice(fresh, rng.choice((1, 1, 2)))]
        talks = [*talks, talk][-8:]
        num_prompt = len(talk) * HASHED - rng.randrange(HASHED - 1)
        num_output = min(800, max(8, round(rng.lognormvariate(math.log(200), 0.6))))
        made.append(Arrival(round(at_s, 3), num_prompt, num_output, tuple(talk)))
        at_s += rng.expovariate(NUM_SYNTHETIC / SYNTHETIC_S)
    return made


def as_azure(arrivals: Iterable[Arrival]) -> str:
    """In Azure's form, from a moment that was chosen."""
    began = datetime.datetime(2026, 1, 1)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for one in arrivals:
        came = (began + datetime.timedelta(seconds=one.at_s)).isoformat(" ", "microseconds")
        rows.append(f"{came}0,{one.num_prompt},{one.num_output}")
    return "\n".join([*rows, ""])


def as_mooncake(arrivals: Iterable[Arrival]) -> str:
    """In Mooncake's form."""
    lines = (
        {
            "timestamp": round(one.at_s * 1000),
            "input_length": one.num_prompt,
            "output_length": one.num_output,
            "hash_ids": list(one.hash_ids),
        }
        for one in arrivals
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    folder, made = Path(sys.argv[1]), synthetic()
    (folder / "synthetic_azure.csv").write_text(as_azure(made))
    (folder / "synthetic_mooncake.jsonl").write_text(as_mooncake(made))
