"""For tests of apps: a scripted engine, or encoder, in a model's place.

Rule: the app and its views stay as they are; only the engine below them is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from flask import Flask

from lmbridge.bridge import Bridge
from lmbridge.errors import EngineStartError, RequestTimeoutError
from lmbridge.flask.models import models_of
from lmbridge.testing import ScriptedEncoder, ScriptedEngine

AnyEngine = TypeVar("AnyEngine", bound=ScriptedEngine)


@contextmanager
def scripted_engine(app: Flask, model: str | None = None, **options: Any) -> Iterator[ScriptedEngine]:
    """Have a ScriptedEngine answer for one of the app's models while the ``with`` lasts.

    Args:
        app: an app with the extension.
        model: the name of the model; default: the default one.
        options: ScriptedEngine's, such as ``script=lambda request: ["Hello"]`` or ``manual=True``.
    """
    with _in_place(app, model, ScriptedEngine, options) as engine:
        yield engine


@contextmanager
def scripted_encoder(app: Flask, model: str | None = None, **options: Any) -> Iterator[ScriptedEncoder]:
    """Have a ScriptedEncoder embed and rerank for one of the app's models while the ``with`` lasts.

    Args:
        app, model: as for ``scripted_engine``.
        options: ScriptedEncoder's, such as ``tasks=["embed"]``.
    """
    with _in_place(app, model, ScriptedEncoder, options) as encoder:
        yield encoder


@contextmanager
def _in_place(
    app: Flask, model: str | None, make: Callable[..., AnyEngine], options: dict[str, Any]
) -> Iterator[AnyEngine]:
    engine = make(**options)
    models = models_of(app)
    name = models.default if model is None else model
    settings = models.settings
    bridge = Bridge(
        engine,
        timeout=settings.timeout,
        max_pending=settings.max_pending,
        max_pending_per_client=settings.max_pending_per_client,
        when_full=settings.when_full,
    )
    real = models.replace(name, bridge)
    try:
        with suppress(EngineStartError, RequestTimeoutError):  # a test may be of what requests meet then
            bridge.start(0 if "start_gate" in options else None)
        yield engine
    finally:
        models.replace(name, real)
        bridge.close()  # what a test has left running is aborted, not waited for
