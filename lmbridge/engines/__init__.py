"""The registry of engines: a name to the module that holds it, imported only when somebody asks for it.

Rule: importing this package imports no engine. ``create`` runs in the thread that builds a Bridge and loads no model.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, UnknownEngineError

EngineFactory = Callable[[], Engine]

ENGINES = {
    "lmdeploy": ("lmbridge.engines.lmdeploy", "LMDeployEngine"),
    "transformers": ("lmbridge.engines.transformers", "TransformersEngine"),
}
"""Engine name to (module, class)."""


def engine_class(name: str) -> type[Engine]:
    """The engine class registered under ``name``.

    Raises:
        UnknownEngineError: there is none; the message lists those there are.
    """
    if name not in ENGINES:
        raise UnknownEngineError(f"There is no engine {name!r}; the engines are {', '.join(sorted(ENGINES))}.")
    module, attribute = ENGINES[name]
    found: type[Engine] = getattr(importlib.import_module(module), attribute)
    return found


def engine_factory(name: str, model: str, options: dict[str, Any]) -> EngineFactory:
    """What builds a new engine each time it is called, its model and options checked now.

    Raises:
        UnknownEngineError: no such engine.
        InvalidRequestError: the engine has no such option, or the option's value is wrong.
        ModelNotFoundError: the model is a folder that does not exist.
    """
    cls: Callable[..., Engine] = engine_class(name)
    known = [parameter for parameter in inspect.signature(cls).parameters if parameter != "model"]
    for option in options:
        if option not in known:
            raise InvalidRequestError(
                f"The engine {name!r} has no option {option!r}; its options are {', '.join(known)}.", param=option
            )
    factory = functools.partial(cls, model, **options)
    factory()  # an engine's __init__ checks values and loads nothing, so this finds mistakes early
    return factory
