"""What every test gets: a check that it left no thread behind, bridges that end with it, and ways to wait."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from lmbridge import Bridge
from lmbridge.testing import ScriptedEngine

hypothesis.settings.register_profile("untimed", deadline=None)  # a slow machine is no fault
hypothesis.settings.load_profile("untimed")


def pytest_report_header(config: pytest.Config) -> str | None:
    """How long it takes, and what is not run, to whoever has asked for all there is."""
    if config.args != config.getini("testpaths"):
        return None
    return (
        "lmbridge: about 5 minutes with -n 2 on two quiet cores. Left out: `-m long` (15 minutes),\n"
        "`-m real tests/real` (downloads two models) and `-m gpu`. .ci/run runs the first two and the optional engines."
    )


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_strikes() -> None:
    """A shell starts what goes in the background with Ctrl-C ignored, and so would be all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def no_thread_left() -> Iterator[None]:
    """Bridges that are closed leave no thread of their own behind; looked at when a module is through."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("lmbridge") and t.is_alive()]
    for thread in left:
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture(autouse=True, scope="module")
def modules_are_no_garbage() -> None:
    """A full collection, of which each engine that closes makes one, looks at what tests make: not at all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[Bridge, ScriptedEngine]]]:
    """Builds a bridge over a scripted engine; keyword arguments go to whichever takes them."""
    bridges: list[Bridge] = []

    def build(engine: Any = None, **options: Any) -> tuple[Bridge, Any]:
        engine = engine or ScriptedEngine()
        bridges.append(Bridge(engine, **options))
        return bridges[-1], engine

    yield build
    for bridge in bridges:
        bridge.close()


def until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Return once ``condition()`` holds; for what nobody announces, so that there is nothing else to wait for.

    Raises:
        TimeoutError: it did not hold within ``timeout`` seconds.
    """
    tick, end = threading.Event(), time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition!r} has not come true within {timeout:g} s")
        tick.wait(0.002)


async def until_then(condition: Callable[[], object]) -> None:
    """``until`` for a task, whose loop goes on meanwhile."""
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0.002)


def until_living(bridge: Bridge, count: int) -> None:
    """Return once so many requests live."""
    until(lambda: len(bridge.requests()) == count)
