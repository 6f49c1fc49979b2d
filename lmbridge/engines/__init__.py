"""The registry of engines: maps names to modules, imported only on demand.

Other packages add engines by entry points in the group ``lmbridge.engines``: a name and an Engine class, whose first
argument is the model.

Rule: importing this package imports no engine. Factories are made on the thread that builds a Bridge, and load nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from lmbridge.engines.auto import AUTO, engine_for
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError, MissingDependencyError, UnknownEngineError
from lmbridge.log import shown

EngineFactory = Callable[[], Engine]

ENGINES = {
    "encoder": ("lmbridge.engines.encoder", "EncoderEngine"),
    "exllamav2": ("lmbridge.engines.exllama", "ExLlamaV2Engine"),
    "exllamav3": ("lmbridge.engines.exllama", "ExLlamaV3Engine"),
    "function": ("lmbridge.engines.function", "FunctionEngine"),
    "llamacpp": ("lmbridge.engines.llamacpp", "LlamaCppEngine"),
    "lmdeploy": ("lmbridge.engines.lmdeploy", "LMDeployEngine"),
    "openai": ("lmbridge.engines.openai", "OpenAIEngine"),
    "ray": ("lmbridge.engines.ray", "RayEngine"),
    "transformers": ("lmbridge.engines.transformers", "TransformersEngine"),
    "vllm": ("lmbridge.engines.vllm", "VLLMEngine"),
}
"""Engine name to (module, class)."""
GROUP = "lmbridge.engines"
"""The entry point group by which other packages add engines."""
OBJECTS = {"sentence_transformers.SentenceTransformer": "encoder", "sentence_transformers.CrossEncoder": "encoder"}
"""Maps the (package, class) of objects accepted as models to the engine that takes them."""


def engine_names() -> list[str]:
    """All registered engine names, those of other packages last."""
    return list(dict.fromkeys([*ENGINES, *sorted(_added())]))


def named_engine(name: str, model: object) -> str:
    """The engine's name; ``"auto"`` chooses by the model.

    Raises:
        ModelNotFoundError, InvalidRequestError: no engine fits the model's name.
    """
    return engine_for(model) if name == AUTO and isinstance(model, str) else name


def engine_class(name: str) -> type[Engine]:
    """The engine class registered under ``name``.

    Raises:
        UnknownEngineError: there is none; the message lists the known ones.
        MissingDependencyError: its package cannot be imported, or provides no Engine.
    """
    if name in ENGINES:
        module, attribute = ENGINES[name]
        found: type[Engine] = getattr(importlib.import_module(module), attribute)
        return found
    added = _added().get(name)
    if added is None:
        raise UnknownEngineError(f"Unknown engine {name!r}; the engines are auto, {', '.join(engine_names())}.")
    return _loaded(added)


def _added() -> dict[str, importlib.metadata.EntryPoint]:
    """Engines of other packages; built-in names take precedence."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP) if point.name not in ENGINES}


def _loaded(point: importlib.metadata.EntryPoint) -> type[Engine]:
    package = point.dist.name if point.dist is not None else point.value
    try:
        found = point.load()
    except (Exception, SystemExit) as cause:
        raise MissingDependencyError(
            f"The engine {point.name!r} of the package {package} cannot be imported ({shown(cause)}); reinstall it: "
            f"pip install --force-reinstall {package}"
        ) from cause
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise MissingDependencyError(
            f"The package {package} registers {shown(found)} as the engine {point.name!r}, which is not a subclass of "
            "lmbridge.Engine. Report this to its author, or use another engine."
        )
    return found


def engine_factory(name: str, model: str, options: dict[str, Any]) -> EngineFactory:
    """A function that builds a new engine on each call; validates the model and options now.

    Raises:
        UnknownEngineError: no such engine.
        InvalidRequestError: an option is unknown or its value is invalid.
        ModelNotFoundError: the model is a folder that does not exist.
    """
    cls: Callable[..., Engine] = engine_class(name)
    factory = functools.partial(cls, model, **_known(cls, name, options))
    factory()  # __init__ validates and loads nothing, so mistakes surface early
    return factory


def engine_around(model: object, options: dict[str, Any]) -> Engine | None:
    """The engine for a model object of another library; None if no engine takes such objects.

    Raises:
        InvalidRequestError: an option is invalid.
    """
    names = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__]
    engine = next((OBJECTS[name] for name in names if name in OBJECTS), None)
    if engine is None:
        return None
    cls: Callable[..., Engine] = engine_class(engine)
    return cls(model, **_known(cls, engine, options))


def _known(cls: Callable[..., Engine], name: str, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options  # some are for an inner engine, which validates them itself
    known = list(parameters)[1:]  # the model comes first
    for option in options:
        if option not in known:
            raise InvalidRequestError(
                f"The engine {name!r} has no option {option!r}; its options are {', '.join(known)}.", param=option
            )
    return options
