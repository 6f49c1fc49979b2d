"""Checks that a library has the names an engine relies on, so that changes are reported by name at the start.

Rule: standard library only. Libraries are imported inside, on an engine's worker thread. A place is written
``module:name.name``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Places = Mapping[str, Sequence[str]]


def missing_parameters(callables: Places) -> Iterator[str]:
    """Missing callables, and parameters that they do not accept."""
    for where, wanted in callables.items():
        found = find(where)
        if found is None:
            yield where
            continue
        present = inspect.signature(found).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in present.values()):
            yield from _absent(where, wanted, present, "({})")


def missing_fields(dataclass_places: Places) -> Iterator[str]:
    """Missing dataclasses, and fields that they lack."""
    for where, wanted in dataclass_places.items():
        found = find(where)
        if found is None:
            yield where
        else:
            yield from _absent(where, wanted, {field.name for field in dataclasses.fields(found)}, ".{}")


def missing_members(classes: Places) -> Iterator[str]:
    """Missing classes, and members that they lack."""
    for where, wanted in classes.items():
        found = find(where)
        if found is None:
            yield where
        else:
            yield from _absent(where, wanted, {*dir(found), *getattr(found, "__annotations__", ())}, ".{}")


def reaches(found: Any, path: str) -> bool:
    """Whether ``found`` has ``path``, names joined by dots."""
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def _absent(where: str, wanted: Sequence[str], present: Any, form: str) -> Iterator[str]:
    for name in wanted:
        if name not in present:
            yield where.partition(":")[2] + form.format(name)


def find(where: str) -> Any:
    """The object named by ``where``, or None."""
    module, _, path = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
