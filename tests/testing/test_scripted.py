"""The scripted engine's cues: what they promise to tests that use it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from lmbridge import Bridge, EngineDeadError
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_the_loop_lives_while_the_start_waits(scripted: Scripted) -> None:
    """An engine that waits at its gate does not hold the loop, so that a caller's deadline is kept meanwhile."""
    gate = threading.Event()
    bridge, engine = scripted(ScriptedEngine(start_gate=gate))
    future = bridge.submit("hello", timeout=60)
    engine.wait_for(lambda engine: bool(engine.threads))
    assert not future.done()
    gate.set()
    assert future.result(10).text == "hello"


def test_a_start_that_waits_ends_with_the_bridge() -> None:
    """A gate that nobody opens holds no thread once the bridge is closed."""
    before = set(threading.enumerate())
    bridge = Bridge(lambda: ScriptedEngine(start_gate=threading.Event()))
    future = bridge.submit("hello")
    bridge.close()
    assert future.exception(10) is not None
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def test_a_stalled_engine_says_nothing_more(scripted: Scripted) -> None:
    """After ``stall`` no step comes and no abort is answered, so that it is the bridge that ends the calls."""
    bridge, engine = scripted(ScriptedEngine(step_time=0.001), stall_timeout=0.5)
    stream = bridge.stream("word " * 1000)
    next(stream)
    engine.stall()
    with pytest.raises(EngineDeadError, match="no progress"):
        for _ in stream:
            pass


def test_steps_that_are_not_made_are_told(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """``step`` on a blocked loop raises, so that a test does not go on as if time had passed."""
    monkeypatch.setattr("lmbridge.testing.scripted.STEP_PATIENCE", 0.1)
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    blocked = threading.Event()
    engine.block(blocked)
    with pytest.raises(TimeoutError, match="made no steps"):
        engine.step()
    blocked.set()
