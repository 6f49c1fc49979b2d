"""What every test gets: a check that it left no thread behind, and bridges that end with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmbridge import Bridge
from lmbridge.testing import ScriptedEngine


@pytest.fixture(autouse=True, scope="module")
def no_thread_left() -> Iterator[None]:
    """Bridges that are closed leave no thread of their own behind; looked at when a module is through."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("lmbridge")]
    for thread in left:
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[Bridge, ScriptedEngine]]]:
    """Builds a bridge over a scripted engine; keyword arguments go to whichever takes them."""
    bridges: list[Bridge] = []

    def build(engine: ScriptedEngine | None = None, **options: Any) -> tuple[Bridge, ScriptedEngine]:
        engine = engine or ScriptedEngine()
        bridges.append(Bridge(engine, **options))
        return bridges[-1], engine

    yield build
    for bridge in bridges:
        bridge.close()
