"""Every output that finishes validates: for schemas of our own, and for 200 of the JSON Schema test suite."""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from model.engine.engine import Engine
from model.grammar import GrammarError
from model.grammar_check import GrammarCheck, of_schema
from model.request import FinishReason, Request, SamplingParams
from service.settings import BUNDLED

SUITE = Path(__file__).parents[2] / "shared/data/schemas/json-schema-test-suite.tar.xz"
NUM_SCHEMAS = 200
DRAFTS = {"draft7": jsonschema.Draft7Validator, "draft2020-12": jsonschema.Draft202012Validator}
OPENING = "Once upon a time there was a list that said"
MAX_TOKENS = 40
# Left to itself a writer of stories never comes to the end of a string. These make it likely, and forbid nothing.
ENDERS, ENDING = b'"]}', 6.0
STARTERS, STARTING = b"{[,:0123456789-tfn", 2.0

Schema = dict[str, Any]


def closed(required: Sequence[str] | None = None, **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    names = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


OURS: dict[str, Schema] = {
    "string": {"type": "string", "minLength": 1, "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}( [A-Z][a-z]{2,5})?$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "address": {"type": "string", "format": "ipv4"},
    "integer": {"type": "integer", "minimum": -7, "maximum": 1234},
    "above": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12},
    "number": {"type": "number", "minimum": 0.25, "maximum": 0.5},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999},
    "enum": {"enum": ["mill", "race", 7, None, True, [1, "x"], {"a": 1}]},
    "const": {"const": {"wheel": ["turns", 3]}},
    "several": {"type": ["boolean", "null", "integer"]},
    "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "object": closed(name={"type": "string", "maxLength": 9}, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "optional": closed(["b"], a={"type": "null"}, b={"type": "boolean"}, c={"enum": ["x", "y"]}),
    "nested": closed(inner=closed(deep=closed(leaf={"type": "boolean"}))),
    "either": {"anyOf": [closed(a={"type": "boolean"}), closed(b={"type": "null"})]},
    "one": {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "maximum": 99, "minimum": 0}]},
    "all": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}]},
    "named": {"$defs": {"small": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/$defs/small"}, "maxItems": 3},
    "tree": {
        "$defs": {"tree": closed(["leaf"], leaf={"type": "boolean"}, next={"$ref": "#/$defs/tree"})},
        "$ref": "#/$defs/tree",
    },
    "patterned": {"type": "object", "patternProperties": {"^[a-d]{1,3}$": {"type": "boolean"}}, "maxProperties": 2}
    | {"additionalProperties": False},
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUNDLED)


def outputs(engine: Engine, schemas: dict[str, Schema], first_seed: int = 0) -> Iterator[tuple[str, str, FinishReason]]:
    """The text for each, and how it ended: at temperature 1, all in the batches that come about."""
    ends, pieces = engine.runner.decoder.config.eos_ids, map(engine.tokenizer.token_bytes, range(4096))
    at = {i: piece[0] for i, piece in enumerate(pieces) if piece and i not in ends}
    bias = {i: ENDING if byte in ENDERS else STARTING for i, byte in at.items() if byte in ENDERS + STARTERS}
    for seed, (name, schema) in enumerate(schemas.items(), first_seed):
        sampling = SamplingParams(
            seed=seed, max_tokens=MAX_TOKENS, stop_token_ids=ends, eos_ids=ends, logit_bias=tuple(bias.items())
        )
        engine.add(Request(name, tuple(engine.tokenizer.encode(OPENING)), sampling, grammar=of_schema(schema)))
    ids: dict[str, list[int]] = defaultdict(list)
    while engine.has_work():
        for delta in engine.step():
            ids[delta.id] += delta.token_ids
            if delta.finish is not None:
                yield delta.id, engine.tokenizer.decode(ids[delta.id]), delta.finish.reason


@pytest.mark.parametrize("first_seed", [0, 1000])
def test_every_output_for_our_own_schemas_that_finishes_validates(engine: Engine, first_seed: int) -> None:
    num_finished = 0
    for name, text, reason in outputs(engine, OURS, first_seed):
        assert reason in (FinishReason.STOP, FinishReason.LENGTH), name
        if reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text), OURS[name], jsonschema.Draft202012Validator)
            num_finished += 1
    assert num_finished > len(OURS) * 3 / 4


def suite() -> Iterator[tuple[str, Schema]]:
    """Schemas of the test suite that the door takes, and that the validator can judge by."""
    door = GrammarCheck()
    with tarfile.open(SUITE) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".json") and "/tests/" in name)
        for name in names:
            file = archive.extractfile(name)
            assert file is not None
            for i, case in enumerate(json.load(file)):
                schema = case["schema"]
                if isinstance(schema, dict) and takes(door, schema) and judges(name, schema, case["tests"]):
                    yield f"{name}#{i}", schema


def takes(door: GrammarCheck, schema: Schema) -> bool:
    try:
        return door.submit(of_schema(schema)).result() == ""
    except GrammarError:
        return False


def exact(text: str) -> Any:
    """JSON with decimal fractions as they are written: 0.3 is a multiple of 0.1."""
    return json.loads(text, parse_float=Decimal)


def validator(name: str, schema: Schema) -> Any:
    return next(found for draft, found in DRAFTS.items() if f"/{draft}/" in name)(exact(json.dumps(schema)))


def judges(name: str, schema: Schema, tests: list[dict[str, Any]]) -> bool:
    """It agrees with the suite on every example, so that it may be asked about others."""
    if "/optional/" in name:
        return False
    try:
        return all(validator(name, schema).is_valid(exact(json.dumps(test["data"]))) == test["valid"] for test in tests)
    except re.error:  # it reads patterns as Python does
        return False


@pytest.mark.timeout(600)
@pytest.mark.skipif(not SUITE.is_file(), reason=f"NOT PROVED HERE: {NUM_SCHEMAS} schemas need {SUITE.name}")
def test_every_output_for_200_schemas_of_the_suite_that_finishes_validates(engine: Engine) -> None:
    found = list(suite())
    chosen = dict(found[i * len(found) // NUM_SCHEMAS] for i in range(NUM_SCHEMAS))
    assert len(chosen) == NUM_SCHEMAS
    num_finished = 0
    for name, text, reason in outputs(engine, chosen):
        assert reason in (FinishReason.STOP, FinishReason.LENGTH), name
        if reason is FinishReason.STOP:
            assert validator(name, chosen[name]).is_valid(exact(text)), f"{name}: {chosen[name]}: {text}"
            num_finished += 1
    assert num_finished > NUM_SCHEMAS / 2
