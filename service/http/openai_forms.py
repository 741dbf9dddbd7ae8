"""The form that an answer must have, where OpenAI's fields say so: a call of a tool, or JSON by a schema.

It writes schemas; whether they can be followed is found out elsewhere. It knows no route.
"""

import json
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from service.errors import InvalidRequest
from service.http.openai_schemas import NamedTool, Tool

Made = TypeVar("Made")

FORMS = frozenset(("response_format", "regex", "grammar"))  # the native fields, of which a request has one at most

# Where one of these stands, an object may be described in several places, and none of them knows it whole.
APART = ("allOf", "if", "not", "dependentSchemas", "unevaluatedProperties", "$dynamicRef")
OPEN = frozenset(("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref"))
SCHEMAS_BY_NAME, LISTS_OF_SCHEMAS = ("properties", "$defs", "definitions"), ("anyOf", "oneOf", "prefixItems")


def forced(choice: Literal["none", "auto", "required"] | NamedTool | None, tools: Sequence[Tool]) -> dict[str, object]:
    """The native fields of an answer that must be a call, none where it need not be one. Raises `InvalidRequest`."""
    if choice is None or choice == "none" or choice == "auto":
        return {}
    offered = [tool for tool in tools if choice == "required" or tool.function.name == choice.function.name]
    if not offered:
        raise InvalidRequest("tool_choice", choice, "the name of one of the `tools`")
    schema = _shallow("tools", lambda: call_of(offered))
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}}


def formed(fields: dict[str, object]) -> dict[str, object]:
    """Native fields, their schema closed. What is no schema stays, to be refused by name. Raises `InvalidRequest`."""
    match fields.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": dict(schema), **about}, **others}:
            form = {"schema": _shallow("response_format", lambda: closed(schema)), **about}
            return fields | {"response_format": {"type": "json_schema", "json_schema": form, **others}}
    return fields


def call_of(tools: Sequence[Tool]) -> dict[str, object]:
    """The JSON Schema of a call of one of the tools: `{"name": ..., "arguments": ...}`."""
    defined, calls = {}, []
    for i, tool in enumerate(tools):
        place = f"#/$defs/tool_{i}"
        defined[f"tool_{i}"] = _moved(closed(tool.function.parameters or {"type": "object"}), place)
        parts: dict[str, object] = {"name": {"const": tool.function.name}, "arguments": {"$ref": place}}
        shape = {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
        calls.append(shape)
    return {"$defs": defined, "anyOf": calls}


def closed(schema: dict[str, object]) -> dict[str, object]:
    """The schema, its objects without properties that it does not name: what fits it fits the one that was given. It is
    what OpenAI's strict mode demands to be written out, and without it a model may go on naming things for ever. A
    schema in which objects are described in parts stays as it is."""
    text = json.dumps(schema)
    return schema if any(f'"{word}":' in text for word in APART) else _closed(schema)


def _shallow(field: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except RecursionError:
        raise InvalidRequest(field, "a schema", "schemas that are not nested so deeply") from None


def _closed(schema: dict[str, object]) -> dict[str, object]:
    told = dict(schema)
    for key in SCHEMAS_BY_NAME:
        named = told.get(key)
        if isinstance(named, dict):
            told[key] = {name: _closed(part) if isinstance(part, dict) else part for name, part in named.items()}
    for key in LISTS_OF_SCHEMAS:
        parts = told.get(key)
        if isinstance(parts, list) and "properties" not in told:  # else they are parts of this object
            told[key] = [_closed(part) if isinstance(part, dict) else part for part in parts]
    if isinstance(told.get("items"), dict):
        told["items"] = _closed(told["items"])  # type: ignore[arg-type]
    properties, required = told.get("properties"), told.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and OPEN.isdisjoint(told):
        told["additionalProperties"] = any(name not in properties for name in required)
    return told


def _moved(schema: object, place: str) -> object:
    """The same schema at another place of a document: what it says of itself points there."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    for word in ("$schema", "$id"):  # of the document that it was; a property of that name is no string
        if isinstance(moved.get(word), str):
            del moved[word]
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
