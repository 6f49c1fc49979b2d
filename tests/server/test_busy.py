"""An engine that is full for a while: what comes meanwhile waits at the bridge's own door, where its rules hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmbridge import Bridge, QueueFullError, RequestTimeoutError
from lmbridge.testing import ScriptedEngine
from tests.conftest import until, until_living


def busy(bridge: Bridge, seconds: float) -> None:
    """The engine says that it takes nothing for so long."""
    bridge._server_thread.ask_engine(lambda engine: engine.on_busy(seconds))


def test_what_comes_waits_until_that_is_over(scripted: Callable[..., tuple[Bridge, ScriptedEngine]]) -> None:
    """Nothing enters a busy engine; a queue that is full says so, deadlines hold, and later all is answered."""
    bridge, engine = scripted(max_pending=2, when_full="reject")
    bridge.start()
    busy(bridge, 3600.0)
    waiting = [bridge.submit(f"prompt {number}") for number in range(2)]
    until_living(bridge, 2)
    with pytest.raises(QueueFullError):
        bridge.infer("one too many")
    waiting.pop().cancel()
    until_living(bridge, 1)
    with pytest.raises(RequestTimeoutError):
        bridge.infer("in vain", timeout=0.05)
    until_living(bridge, 1)
    assert bridge.requests()[0].state == "waiting"
    busy(bridge, 0.0)
    assert waiting[0].result(30).text
    assert bridge.infer("as ever", timeout=30).text
    assert engine.stats()["in_flight"] == 0


def test_it_ends_by_itself(scripted: Callable[..., tuple[Bridge, ScriptedEngine]]) -> None:
    """Nobody has to say that the time is over, and what ran goes on meanwhile."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.001))
    stream = bridge.stream("word " * 20, timeout=30)
    next(stream)
    busy(bridge, 0.2)
    assert bridge.infer("after a while", timeout=30).text
    assert list(stream)
    assert stream.response.text
    until(lambda: not bridge.requests())
