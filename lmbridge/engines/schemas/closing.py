"""Forbids additional properties of objects that name theirs, if the schema leaves that open.

Rule: pure functions of plain data. A small model that may add properties never stops; the result without them is still
valid. Where parts of a schema overlay each other nothing is closed, because one part would forbid what another
requires.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
_OVERLAID = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_SAID = (*_OVERLAID, "additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties")


def overlays(root: Any) -> bool:
    """Whether several parts of the schema describe one object."""
    for schema in _schemas(root):
        several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
        if several or ("properties" in schema and any(key in schema for key in _OVERLAID)):
            return True
    return False


def closed(schema: Schema) -> Schema:
    """The schema without additional properties, unless it mentions them."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list) or any(key in schema for key in _SAID):
        return schema
    if not set(required) <= properties.keys() or schema.get("minProperties", 0) > len(properties):
        return schema
    return {**schema, "additionalProperties": False}


def _schemas(value: Any) -> Iterator[Schema]:
    """All dicts in it; some may not be schemas, which is only overly cautious."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            yield part
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)
