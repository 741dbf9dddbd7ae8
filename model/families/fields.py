"""Reading a checkpoint's JSON files with every value's type and range checked. Knows no family and no meaning."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from model.config import CheckpointError

T = TypeVar("T")
ABOVE_0 = math.ulp(0.0)
LARGEST_INT = 2**63 - 1
LARGEST = sys.float_info.max


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises CheckpointError when there is no such file, no JSON or no object in it."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {shown(value)}, expected a JSON object")
    return value


def shown(value: object) -> str:
    """A JSON value for an error message, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """One JSON object. A null counts as absent; every error is a CheckpointError naming the file and the key."""

    def __init__(self, raw: Mapping[str, object], source: str) -> None:
        self.raw, self.source = raw, source

    def fail(self, key: str, expected: str) -> NoReturn:
        found = f"is {shown(self.raw[key])}" if key in self.raw else "is missing"
        raise CheckpointError(f"{self.source}: {key} {found}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST_INT) -> int:
        """A whole number from `least` to `most`; with no default the key is required."""
        value = self.raw.get(key) if self.has(key) else default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.fail(
                key, f"a whole number of at least {least}" + ("" if most == LARGEST_INT else f" and at most {most}")
            )
        return value

    def number(self, key: str, default: float | None = None, least: float = ABOVE_0, most: float = LARGEST) -> float:
        """A finite number from `least` to `most`; with no default the key is required."""
        value = self.raw.get(key) if self.has(key) else default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            low = "above 0" if least == ABOVE_0 else f"of at least {least:g}"
            self.fail(key, f"a number {low}" + ("" if most == LARGEST else f" and at most {most:g}"))
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key) if self.has(key) else False
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def word(self, key: str, meanings: Mapping[str, T]) -> T:
        """What a word means, one of a known set."""
        value = self.raw.get(key)
        if not isinstance(value, str) or value not in meanings:
            self.fail(key, "one of " + ", ".join(meanings))
        return meanings[value]

    def words(self, key: str, meanings: Mapping[str, T]) -> tuple[T, ...]:
        """What a list of words means."""
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) and item in meanings for item in value):
            self.fail(key, "a list of " + ", ".join(meanings))
        return tuple(meanings[item] for item in value)

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids given as one number, a list of them, or null. Those the network has no row for are left out: small
        test checkpoints carry the ids of the full-size vocabulary, and what can't be drawn can't end anything."""
        value = self.raw.get(key)
        ids: list[int] = []
        for item in value if isinstance(value, list) else [value] if self.has(key) else []:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                self.fail(key, "a token id, a list of them or null")
            ids.append(item)
        return tuple(item for item in ids if item < vocab_size)

    def section(self, key: str) -> "Fields | None":
        """A nested object, None when it is absent or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object or null")
        return Fields(value, f"{self.source}: {key}")
