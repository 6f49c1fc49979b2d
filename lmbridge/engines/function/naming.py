"""Finds a function by name, and its kind.

Rule: plain functions, on the thread that builds a Bridge; imports the named module.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from lmbridge.errors import InvalidRequestError, ModelNotFoundError
from lmbridge.log import shown

BUILDER = "lmbridge_builds_engine"
"""An attribute of what ``function_engine`` returns."""


def find_function(given: Any) -> Callable[..., Any]:
    """The function itself, or the one named ``"module:name"``; modules in the working directory are found too.

    Raises:
        ModelNotFoundError: there is no such module, or nothing of that name in it.
        InvalidRequestError: it is neither a function nor a name of that form.
    """
    found = given
    if isinstance(given, str) and all(given.partition(":")):
        found = _named(given)
    elif not callable(given):
        raise InvalidRequestError(
            f"The function engine needs a function, or its name as 'module:name', not {shown(given)}.", "function"
        )
    if hasattr(found, BUILDER):
        raise InvalidRequestError(
            f"{given} is the result of function_engine(); name the function itself and pass its options separately.",
            "function",
        )
    if not callable(found):
        raise InvalidRequestError(f"{given} is {shown(found)}, which is not callable; name a function.", "function")
    function: Callable[..., Any] = found
    return function


def _named(given: str) -> Any:
    module, _, name = given.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # for a command, sys.path has its own folder, not the working directory
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as cause:
        raise ModelNotFoundError(f"There is no function {given!r}: {cause}. Write it as 'module:name'.") from cause
    return found


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it belongs on the loop."""
    return any(map(inspect.iscoroutinefunction, _faces(function))) or any(
        map(inspect.isasyncgenfunction, _faces(function))
    )


def yields(function: Callable[..., Any]) -> bool:
    """Whether it yields its answer in pieces."""
    kinds = (inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    return any(kind(face) for kind in kinds for face in _faces(function))


def takes_config(function: Callable[..., Any]) -> bool:
    """Whether it has a parameter ``config``."""
    try:
        return "config" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no signature to inspect
        return False


def _faces(function: Callable[..., Any]) -> list[Any]:
    """The function, and the ``__call__`` of an object."""
    return [function, getattr(function, "__call__", None)]  # noqa: B004
