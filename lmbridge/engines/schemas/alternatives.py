"""Whether a value may match several alternatives of ``oneOf``.

Rule: pure functions of plain data. Each alternative is examined once, and the comparison is bounded, because it blocks
the worker thread.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lmbridge.engines.schemas.references import References

Schema = dict[str, Any]
_MOST_WORK = 1_500_000  # about a second
_DEEPEST = 4


class TooManyError(Exception):
    """Comparing them would take too long."""


class _Facts(NamedTuple):
    schema: Any
    kinds: set[str]
    values: set[str] | None
    required: list[str]


class Alternatives:
    """Compares those of one schema."""

    def __init__(self, references: References) -> None:
        self._references = references
        self._facts: dict[int, tuple[Any, _Facts]] = {}  # by the ids of the schemas, which are kept for that
        self._work = 0

    def disjoint(self, options: list[Any]) -> bool:
        """Whether no value matches two of them.

        Raises:
            TooManyError: it would take too long.
        """
        return all(
            self._apart(one, other, _DEEPEST) for number, one in enumerate(options) for other in options[:number]
        )

    def _apart(self, one: Any, other: Any, depth: int) -> bool:
        mine, its = self._known(one), self._known(other)
        if not isinstance(mine.schema, dict) or not isinstance(its.schema, dict) or not depth:
            return mine.schema is False or its.schema is False
        self._spend(1)
        if mine.kinds and its.kinds and not mine.kinds & its.kinds:
            return True
        if mine.values is not None and its.values is not None:
            self._spend(min(len(mine.values), len(its.values)) // 10)
            return mine.values.isdisjoint(its.values)
        if {"object"} not in (mine.kinds, its.kinds):
            return False
        self._spend(len(mine.required) + len(its.required))
        return _lacks(mine, its) or _lacks(its, mine) or self._told_apart(mine, its, depth - 1)

    def _told_apart(self, one: _Facts, other: _Facts, depth: int) -> bool:
        mine, its = one.schema.get("properties", {}), other.schema.get("properties", {})
        both = set(one.required).intersection(other.required, mine, its)
        tags_first = sorted(both, key=lambda name: (self._known(mine[name]).values is None, name))
        return any(self._apart(mine[name], its[name], depth) for name in tags_first)

    def _known(self, schema: Any) -> _Facts:
        if id(schema) not in self._facts:
            self._facts[id(schema)] = schema, _facts(self._references.resolved(schema))
        return self._facts[id(schema)][1]

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > _MOST_WORK:
            raise TooManyError


def _facts(schema: Any) -> _Facts:
    if not isinstance(schema, dict):
        return _Facts(schema, set(), None, [])
    return _Facts(schema, _kinds(schema), _values(schema), list(schema.get("required", ())))


def _kinds(schema: Schema) -> set[str]:
    """The types of its values, as far as it says."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {_kind(value) for value in values}
    kinds = schema.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    return {"number" if kind == "integer" else kind for kind in kinds}


def _kind(value: Any) -> str:
    named = {bool: "boolean", str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return named.get(type(value), "null")


def _values(schema: Schema) -> set[str] | None:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return {json.dumps(_plain(value), sort_keys=True) for value in values} if isinstance(values, list) else None


def _plain(value: Any) -> Any:
    """The value with equal numbers in the same form."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lacks(one: _Facts, other: _Facts) -> bool:
    """Whether one forbids a property that the other requires."""
    schema = one.schema
    closed = schema.get("additionalProperties") is False and not {"patternProperties", "allOf", "$ref"} & schema.keys()
    return closed and any(name not in schema.get("properties", {}) for name in other.required)
