"""Structured output: what a grammar may be, and which ids it allows next. The one place that knows llguidance."""

import json
from collections.abc import Mapping

from model.request import Grammar

MAX_REGEX_CHARS, MAX_GRAMMAR_CHARS, MAX_SCHEMA_CHARS = 1024, 8192, 32_768


class GrammarError(ValueError):
    """A grammar that can't be taken: one line, for the client."""


def check(grammar: Grammar) -> None:
    """Raises `GrammarError`."""
    raise GrammarError(f"{grammar.kind} is not taken yet")


def of_schema(schema: Mapping[str, object]) -> Grammar:
    """A JSON schema as a grammar. Raises `GrammarError`."""
    try:
        return Grammar("json_schema", json.dumps(schema, allow_nan=False))
    except (ValueError, RecursionError):
        raise GrammarError("a schema of finite numbers") from None
