"""Rewrites single keywords of JSON schemas.

Rule: each function gets one schema, which it must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmbridge.engines.schemas.formats import in_format, with_pattern

Schema = dict[str, Any]
BOUNDS = (("maximum", 1), ("exclusiveMaximum", 1), ("minimum", -1), ("exclusiveMinimum", -1))
WIDEST = 10**18
"""The largest bound llguidance supports: less than the 64-bit range that libraries write."""


def _one_of(schema: Schema) -> Schema:
    if "oneOf" not in schema:
        return schema
    options = schema["oneOf"]
    rest = {key: value for key, value in schema.items() if key != "oneOf"}
    if "anyOf" not in rest:
        return {**rest, "anyOf": options}
    return {**rest, "allOf": [*rest.get("allOf", []), {"anyOf": options}]}


def _names(schema: Schema) -> Schema:
    """``propertyNames``: any, some, or those of a pattern."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict):
        return schema
    rest = {key: value for key, value in schema.items() if key != "propertyNames"}
    values = schema.get("additionalProperties", True)
    asked = names.keys() - {"type", "title", "description"}
    if names.get("type", "string") != "string" or len(asked) > 1 or asked - {"enum", "const", "pattern"}:
        return schema
    if not asked:
        return rest
    if "properties" in schema or "patternProperties" in schema:
        return schema
    if "pattern" in names:
        return {**rest, "patternProperties": {names["pattern"]: values}, "additionalProperties": False}
    some = [name for name in names.get("enum", [names.get("const")]) if isinstance(name, str)]
    return {**rest, "properties": dict.fromkeys(some, values), "additionalProperties": False}


def _bounds(schema: Schema) -> Schema:
    far = {key: sign * WIDEST for key, sign in BOUNDS if is_number(schema.get(key)) and sign * schema[key] > WIDEST}
    return {**schema, **far}


def is_number(value: Any) -> bool:
    """Whether it is a number in JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unique(schema: Schema) -> Schema:
    most = schema.get("maxItems")
    harmless = schema.get("uniqueItems") is False or (isinstance(most, int) and most < 2)
    return {key: value for key, value in schema.items() if key != "uniqueItems"} if harmless else schema


def _unevaluated(schema: Schema) -> Schema:
    """Without sibling subschemas it means the same as the plain keyword."""
    if schema.keys() & {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "contains"}:
        return schema
    for old, new in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if old in schema:
            rest = {key: value for key, value in schema.items() if key != old}
            schema = rest if new in rest else {**rest, new: schema[old]}
    return schema


def _dependent(schema: Schema) -> Schema:
    """Properties required by others are always required."""
    for key in ("dependentRequired", "dependencies"):
        asked = schema.get(key)
        if isinstance(asked, dict) and all(isinstance(names, list) for names in asked.values()):
            rest = {each: value for each, value in schema.items() if each != key}
            needed = [*rest.get("required", []), *(name for names in asked.values() for name in names)]
            schema = {**rest, "required": list(dict.fromkeys(needed))}
    return schema


REWRITES: tuple[Callable[[Schema], Schema], ...] = (
    _unevaluated, _one_of, in_format, with_pattern, _names, _bounds, _unique, _dependent,
)  # fmt: skip
