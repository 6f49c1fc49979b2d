"""Engines whose own code exits, is cancelled, or says that it is dead at the wrong moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

import lmbridge.server.sweep
from lmbridge import (
    Bridge,
    EngineDeadError,
    EngineError,
    EngineStartError,
)
from lmbridge.engines.base import Sink
from lmbridge.messages import Request
from lmbridge.testing import ScriptedEngine
from tests.server.workshop import Workshop, turns

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


RAISED = [asyncio.CancelledError(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]


class Rude(ScriptedEngine):
    """Raises something where an engine should not."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(lambda request: [where])
        self._where = where
        self._error = error
        if where == "build":
            raise error

    async def start(self) -> None:
        if self._where == "start":
            raise self._error
        await super().start()

    async def close(self) -> None:
        await super().close()
        if self._where == "close":
            raise self._error

    def stats(self) -> dict[str, float]:
        if self._where == "stats":
            raise self._error
        return super().stats()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", RAISED, ids=repr)
@pytest.mark.parametrize("where", ["build", "start"])
def test_a_swap_to_an_engine_that_exits(where: str, error: BaseException, overlap: bool) -> None:
    """What a new engine raises while it loads must not take the healthy one with it."""
    with Bridge(Workshop(manual=False)) as bridge:
        with pytest.raises(EngineStartError, match=type(error).__name__):
            bridge.swap(lambda: Rude(where, error), overlap=overlap)
        assert bridge.infer("and on", timeout=30).text == "and on"
        assert bridge.state == "ready"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_swap_from_an_engine_that_exits(error: BaseException, overlap: bool) -> None:
    """What an old engine raises while it closes must not take the new one with it."""
    with Bridge(lambda: Rude("close", error)) as bridge:
        bridge.swap(ScriptedEngine, overlap=overlap)
        assert bridge.infer("and on", timeout=30).text == "and on"
        turns(bridge)
        assert bridge.state == "ready"


@pytest.mark.parametrize("error", RAISED, ids=repr)
@pytest.mark.parametrize("where", ["build", "start"])
def test_a_first_engine_that_exits(where: str, error: BaseException) -> None:
    """Everybody who waits for the model is told why it did not come, and the bridge can still be given another."""
    bridge = Bridge(lambda: Rude(where, error))
    with pytest.raises(EngineStartError, match=type(error).__name__):
        bridge.infer("hello", timeout=30)
    bridge.swap(ScriptedEngine)
    assert bridge.infer("hello").text == "hello"
    bridge.close()


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_close_that_exits(error: BaseException) -> None:
    """close() has to end the bridge whatever the engine raises then."""
    bridge = Bridge(lambda: Rude("close", error)).start()
    bridge.close()
    assert (bridge.state, bridge.health().reason) == ("closed", "")


def test_an_engine_that_cancels_its_own_task() -> None:
    """A library that cancels the task it runs in while it loads is one that failed, and no order of ours to stop."""

    class Cancels(ScriptedEngine):
        async def start(self) -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    with Bridge(Workshop(manual=False)) as bridge:
        with pytest.raises(EngineStartError, match="CancelledError"):
            bridge.swap(Cancels)
        assert bridge.infer("and on").text == "and on"


def test_a_factory_that_builds_no_engine() -> None:
    """A function that forgot its return statement is told what it returned."""
    bridge = Bridge(lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(EngineStartError, match="must return an Engine, not None"):
        bridge.start()
    bridge.close()


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()], ids=repr)
def test_a_question_that_makes_the_engine_exit(error: BaseException) -> None:
    """Whoever asks for statistics must get an error, and not the engine's order to leave."""
    with Bridge(lambda: Rude("stats", error)) as bridge:
        with pytest.raises(EngineError, match="could not answer"):
            bridge.stats()
        assert bridge.infer("and on").text == "stats"


def test_a_name_that_begins_to_raise() -> None:
    """Messages say what failed, and need not fail for want of a name."""

    class Nameless(ScriptedEngine):
        begun = False

        @property
        def name(self) -> str:  # type: ignore[override]
            if self.begun:
                raise ValueError("no name any more")
            return "named"

        def add_request(self, request: Request, sink: Sink) -> None:
            self.begun = True
            raise TypeError("as told")

        def stats(self) -> dict[str, float]:
            raise SystemExit(3)

    with Bridge(Nameless) as bridge:
        with pytest.raises(EngineError, match="Nameless could not begin the request"):
            bridge.infer("hello", timeout=30)
        with pytest.raises(EngineError, match="Nameless could not answer"):
            bridge.stats()


# --- on_death ---


def test_a_death_told_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own thread tells its end: it is heard at once, though it is not the server thread."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 3600.0)  # nothing else wakes the loop
    workshop = Workshop()
    with Bridge(workshop) as bridge:
        begun = bridge.submit("never stepped")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        threading.Thread(target=lambda: workshop.built[0].on_death(ValueError("device lost"))).start()
        assert isinstance(begun.exception(30), EngineDeadError)
        assert bridge.infer("and on").text == "and on"


def test_a_death_told_again_and_again() -> None:
    """The first cause counts; what an engine says twice, after its end, or without an exception harms nobody."""
    workshop = Workshop(manual=False)
    with Bridge(workshop) as bridge:
        first = workshop.built[0]
        tell: Callable[[object], None] = first.on_death  # type: ignore[assignment]
        tell("no exception")
        tell(ValueError("another cause"))
        turns(bridge)
        assert bridge.infer("and on").text == "and on"
        first.wait_for(lambda e: e.closed)
        tell(ValueError("late"))
        assert bridge.infer("and on").text == "and on"
        assert bridge.health().restarts == 1
    tell(ValueError("much too late"))
    workshop.built[1].on_death(ValueError("too late as well"))
