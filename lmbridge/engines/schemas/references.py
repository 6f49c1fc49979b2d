"""Resolves the references of a schema.

Rule: pure functions of plain data; references within the schema only; llguidance handles the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_LONGEST = 200  # the longest chain of references
_ROUNDS = 50
_NOTES = {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}


class References:
    """The references of one schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._plain = '"$id"' not in json.dumps(root)  # else a reference may start elsewhere

    def resolved(self, schema: Any) -> Any:
        """The target of a reference, ignoring keywords beside it; None if not found."""
        for _ in range(_LONGEST):
            if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#"):
                break
            schema = self._target(schema["$ref"])
        return schema

    def replaced(self, schema: Any) -> Any:
        """The same, but a schema with further keywords stays as it is."""
        alone = isinstance(schema, dict) and not schema.keys() - _NOTES - {"$ref"}
        return self.resolved(schema) if alone else schema

    def is_lost(self, reference: Any) -> bool:
        """Whether a reference certainly has no target."""
        local = self._plain and isinstance(reference, str) and reference.startswith("#/")
        return local and self._target(reference) is None

    def endless(self) -> str | None:
        """A reference without any finite value, since each would contain another."""
        open_, changed = set(_references(self._root)), True
        for _ in range(_ROUNDS):
            if not changed:
                break
            ending = {each for each in open_ if _ends(self._target(each), open_)}
            open_, changed = open_ - ending, bool(ending)
        settled = self._plain and not changed
        return min(open_) if settled and not _ends(self._root, open_) else None

    def _target(self, reference: str) -> Any:
        target = self._root
        for name in reference.split("/")[1:]:
            name = unquote(name).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = target[int(name)] if name.isdecimal() and int(name) < len(target) else None
            else:
                target = target.get(name) if isinstance(target, dict) else None
        return target


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            yield reference
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _references(inner)


def _ends(schema: Any, endless: set[str]) -> bool:
    """Whether it has a finite value if those references have none."""
    if not isinstance(schema, dict):
        return True
    if schema.get("$ref") in endless or not all(_ends(part, endless) for part in _needed(schema)):
        return False
    options = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) and schema[key]]
    return all(any(_ends(option, endless) for option in each) for each in options)


def _needed(schema: dict[str, Any]) -> list[Any]:
    """The schemas that a value or its contents must match."""
    inside = schema.get("properties", {})
    objects = schema.get("type") == "object"
    needed = [inside[name] for name in schema.get("required", ()) if objects and name in inside]
    least = schema.get("minItems") if schema.get("type") == "array" else 0
    least = least if isinstance(least, int) else 0
    first = schema.get("prefixItems", [])
    if least > len(first):
        needed.append(schema.get("items"))
    return [*schema.get("allOf", []), *needed, *first[:least]]
