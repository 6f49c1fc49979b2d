"""An engine that is full for a while: what comes meanwhile waits at the bridge's own door, where its rules hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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
    begun = next(stream).text
    busy(bridge, 0.2)
    assert bridge.infer("after a while", timeout=30).text
    assert begun + "".join(delta.text for delta in stream) == stream.response.text
    assert stream.response.finish_reason == "stop"
    until(lambda: not bridge.requests())


@pytest.mark.parametrize("seconds", [float("inf"), 10**400, 1e308])
def test_nobody_is_busy_for_ever(scripted: Callable[..., tuple[Bridge, ScriptedEngine]], seconds: float) -> None:
    """However long an engine says, it is asked again in minutes, and health says what holds the calls up."""
    bridge, _ = scripted()
    bridge.start()
    busy(bridge, seconds)
    health = bridge.health()
    assert health.state == "ready"
    found = re.search(r"full and takes no requests for another ([\d.]+) s", health.reason)
    assert found is not None
    assert float(found[1]) <= 120
    busy(bridge, 0)
    assert bridge.health().reason == ""


@pytest.mark.parametrize("seconds", [None, "5", float("nan")])
def test_what_is_no_time(scripted: Callable[..., tuple[Bridge, ScriptedEngine]], seconds: Any) -> None:
    """An engine that says nonsense costs nobody an answer."""
    bridge, _ = scripted()
    bridge.start()
    busy(bridge, seconds)
    assert bridge.infer("as ever", timeout=30).text
