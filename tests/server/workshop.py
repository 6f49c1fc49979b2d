"""Engines that are built, stand still, block their loop or say where they are, for the tests of the server's life."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lmbridge import Bridge
from lmbridge.engines.standing import where_is
from lmbridge.server.loop import ServerLoop
from lmbridge.testing import ScriptedEngine

T = TypeVar("T")


class Workshop:
    """A factory whose first engine makes no step by itself, and the engines it has built.

    ``spoiled``: what the next engines are loaded with, one after another; with None they load.
    """

    def __init__(self, *, manual: bool = True, max_batch_size: int = 1) -> None:
        self.built: list[ScriptedEngine] = []
        self.spoiled: list[BaseException | None] = []
        self._manual = manual
        self._max_batch_size = max_batch_size

    def __call__(self) -> ScriptedEngine:
        error = self.spoiled.pop(0) if self.spoiled else None
        manual = self._manual and not self.built
        engine = ScriptedEngine(manual=manual, max_batch_size=self._max_batch_size, start_error=error)
        self.built.append(engine)
        return engine


class Threaded(ScriptedEngine):
    """An engine that makes no step by itself, and whose work is done by a thread of its own, which waits."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.release = threading.Event()
        self.worker = threading.Thread(target=self._wait_in_a_kernel, daemon=True)
        self.worker.start()

    def _wait_in_a_kernel(self) -> None:
        self.release.wait(60)

    def where(self) -> str:
        return f"its thread stands in {where_is(self.worker.ident)}"

    async def close(self) -> None:
        self.release.set()
        await super().close()


class Blocked:
    """A server thread that is held up, as by native code that does not return; until the end of the ``with``."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._held = threading.Event()
        self._release = threading.Event()

    def __enter__(self) -> Blocked:
        self._bridge._server_thread.handle.run_soon(self._stand_still)
        assert self._held.wait(30)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._release.set()

    def _stand_still(self) -> None:
        self._held.set()
        self._release.wait(60)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Run ``function`` on a thread of its own that holds nobody up; what came of it."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def server_loop(bridge: Bridge) -> ServerLoop:
    """What runs on the server thread."""
    run = bridge._server_thread.keeper.run
    assert run is not None
    return run.loop


def turns(bridge: Bridge, count: int = 3) -> None:
    """Return when the server's loop has gone round so often: what was set off before has had its effect."""
    for _ in range(count):
        bridge._server_thread.handle.ask(lambda: None)


def run_script(source: str) -> subprocess.CompletedProcess[str]:
    """A Python program of its own; a hang in it fails the test that runs it."""
    program = "from lmbridge import *\nfrom lmbridge.testing import ScriptedEngine\n" + textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
