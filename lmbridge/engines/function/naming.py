"""Which function is meant, and what it is for.

Rule: plain functions, on the thread that builds a Bridge; a module is imported here where one is named.
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
    """The function itself, or the one that ``"module:name"`` names; modules in the working directory are found too.

    Raises:
        ModelNotFoundError: there is no such module, or nothing of that name in it.
        InvalidRequestError: it is no function, nor a name of that form.
    """
    found = given
    if isinstance(given, str) and all(given.partition(":")):
        found = _named(given)
    elif not callable(given):
        raise InvalidRequestError(
            f"The function engine takes a function, or its name as 'module:name', not {shown(given)}.", "function"
        )
    if hasattr(found, BUILDER):
        raise InvalidRequestError(
            f"{given} is what function_engine() has made; name the function itself, and give its options beside it.",
            "function",
        )
    if not callable(found):
        raise InvalidRequestError(f"{given} is {shown(found)}, which cannot be called; name a function.", "function")
    function: Callable[..., Any] = found
    return function


def _named(given: str) -> Any:
    module, _, name = given.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # a command has its own folder there, not the one that it was called in
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as cause:
        raise ModelNotFoundError(f"There is no function {given!r}: {cause}; write it as 'module:name'.") from cause
    return found


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it belongs on the loop."""
    return any(map(inspect.iscoroutinefunction, _faces(function))) or any(
        map(inspect.isasyncgenfunction, _faces(function))
    )


def yields(function: Callable[..., Any]) -> bool:
    """Whether it gives its answer in pieces."""
    kinds = (inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    return any(kind(face) for kind in kinds for face in _faces(function))


def takes_config(function: Callable[..., Any]) -> bool:
    """Whether it has a parameter ``config``."""
    try:
        return "config" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # one that does not say
        return False


def _faces(function: Callable[..., Any]) -> list[Any]:
    """The function, and what an object's ``__call__`` is."""
    return [function, getattr(function, "__call__", None)]  # noqa: B004
