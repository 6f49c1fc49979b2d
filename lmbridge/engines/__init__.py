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
    "encoder": ("lmbridge.engines.encoder", "EncoderEngine"),
    "lmdeploy": ("lmbridge.engines.lmdeploy", "LMDeployEngine"),
    "transformers": ("lmbridge.engines.transformers", "TransformersEngine"),
}
"""Engine name to (module, class)."""
OBJECTS = {"sentence_transformers.SentenceTransformer": "encoder", "sentence_transformers.CrossEncoder": "encoder"}
"""Package and class of an object that may be given as a model, to the name of the engine that takes it."""


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
    factory = functools.partial(cls, model, **_known(cls, name, options))
    factory()  # an engine's __init__ checks values and loads nothing, so this finds mistakes early
    return factory


def engine_around(model: object, options: dict[str, Any]) -> Engine | None:
    """The engine for a model that another library has loaded, if there is one for such objects; else None.

    Raises:
        InvalidRequestError: an option is wrong.
    """
    names = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__]
    engine = next((OBJECTS[name] for name in names if name in OBJECTS), None)
    if engine is None:
        return None
    cls: Callable[..., Engine] = engine_class(engine)
    return cls(model, **_known(cls, engine, options))


def _known(cls: Callable[..., Engine], name: str, options: dict[str, Any]) -> dict[str, Any]:
    known = [parameter for parameter in inspect.signature(cls).parameters if parameter != "model"]
    for option in options:
        if option not in known:
            raise InvalidRequestError(
                f"The engine {name!r} has no option {option!r}; its options are {', '.join(known)}.", param=option
            )
    return options
