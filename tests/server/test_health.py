"""What health says is true, whatever goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

import lmbridge.crossing.handle
import lmbridge.server.health
import lmbridge.server.keeper
import lmbridge.server.places
import lmbridge.server.supervisor
import lmbridge.server.sweep
import lmbridge.server.watchdog
from lmbridge import (
    Bridge,
    RequestTimeoutError,
)
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.server.workshop import Blocked, Threaded, server_loop, turns

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_health_tells_the_truth(scripted: Scripted) -> None:
    """health() says what a load balancer must know, in every state, with the reason where it is not ready."""
    gate = threading.Event()
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1, start_gate=gate))
    assert bridge.health().state == "new"
    futures = [bridge.submit("one"), bridge.submit("two")]
    assert bridge.health().state == "starting"
    gate.set()
    engine.wait_for(lambda e: e.active == 1)
    health = bridge.health()
    assert (health.state, health.waiting, health.running, health.restarts) == ("ready", 1, 1, 0)
    engine.crash(ValueError("device lost"))
    assert futures[1].exception(10) is not None
    health = bridge.health()
    assert health.state == "failed"
    assert "device lost" in health.reason
    bridge.close()
    assert bridge.health().state == "closed"


def test_health_while_the_loop_is_stuck(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer would send more requests to a server thread that serves none of them."""
    bridge, _ = scripted(stall_timeout=None)
    bridge.infer("hello")
    with monkeypatch.context() as patch, Blocked(bridge):
        patch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", -1.0)  # any silence is too long
        health = bridge.health()
        assert health.state == "restarting"
        assert health.reason.startswith("the server thread has not answered for 0 s; it is in ")
        assert "_stand_still" in health.reason
        assert health.silent > 0.0
    turns(bridge)
    assert (bridge.state, bridge.health().reason) == ("ready", "")


def test_health_before_a_death_is_handled(scripted: Scripted) -> None:
    """An engine that has just died would be called ready for as long as the loop is busy with something else."""
    bridge, engine = scripted()
    bridge.start()
    told, release = threading.Event(), threading.Event()

    def die() -> None:
        engine.on_death(ValueError("device lost"))
        told.set()
        release.wait(30)

    bridge._server_thread.server(True).run_soon(die)
    assert told.wait(10)
    health = bridge.health()
    release.set()
    assert (health.state, health.reason) == ("restarting", "the engine died: ValueError('device lost')")
    until(lambda: bridge.state == "failed")


def test_health_while_a_dead_engine_is_closed() -> None:
    """A dead engine that takes its time to close would be called ready all the while."""
    closing, release = threading.Event(), threading.Event()

    class Slow(ScriptedEngine):
        async def close(self) -> None:
            closing.set()
            release.wait(30)

    bridge = Bridge(lambda: Slow())
    bridge.start()
    place = server_loop(bridge).calls.place
    assert isinstance(place.engine if place else None, Slow)
    place.engine.crash(ValueError("device lost"))  # type: ignore[union-attr]
    assert closing.wait(10)
    health = bridge.health()
    release.set()
    assert (health.state, health.reason) == ("restarting", "the engine died: ValueError('device lost')")
    assert bridge.infer("hello", timeout=30).text == "hello"
    bridge.close()


def test_health_of_a_thread_that_ended_without_a_word(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the server thread, and however suddenly, it is not called ready any more."""
    bridge, _ = scripted()
    bridge.start()
    host = bridge._server_thread
    monkeypatch.setattr(host.keeper, "_end", lambda run, cause: None)
    bridge._server_thread.handle.run_soon(server_loop(bridge).loop.stop)
    assert host.keeper.run is not None
    assert host.keeper.run.thread is not None
    host.keeper.run.thread.join(30)
    health = bridge.health()
    assert (health.state, health.reason) == ("failed", "the server thread has ended")
    monkeypatch.undo()
    bridge.close()
    assert bridge.state == "failed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_health_in_a_forked_child(scripted: Scripted) -> None:
    """In a child process there is no server thread; its copy of the bridge is not ready."""
    bridge, _ = scripted()
    bridge.start()
    child = os.fork()
    if child == 0:
        health = bridge.health()
        os._exit(0 if health.state == "failed" and "another process" in health.reason else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bridge.state == "ready"


def test_health_tells_of_an_engine_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a first token could not tell a slow engine from one that hangs, until stall_timeout."""
    monkeypatch.setattr(lmbridge.server.health, "QUIET", 0.2)
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.02)
    engine = Threaded()
    with Bridge(engine) as bridge:
        future = bridge.submit("one two")
        until(lambda: bridge.health().reason)
        reason = bridge.health().reason
        assert bridge.state == "ready"
        assert reason.startswith("the engine has made no progress for ")
        assert "_wait_in_a_kernel" in reason
        engine.step(2)
        assert future.result(10).text == "one two"
        assert bridge.health().reason == ""


def test_a_deadline_gives_advice_that_helps(scripted: Scripted) -> None:
    """A caller who got not one token would be told to ask for fewer of them."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    bridge.start()
    silent, waiting = bridge.submit("one two three", timeout=0.4), bridge.submit("queued", timeout=0.2)
    assert "health() says what delays the queue" in str(waiting.exception(10))
    assert "No token had arrived. health() says whether it makes progress" in str(silent.exception(10))
    stream = bridge.stream("one two three", timeout=1.0)
    engine.wait_for(lambda e: e.active == 1)
    engine.step()
    assert next(stream).text == "one"
    with pytest.raises(RequestTimeoutError, match="lower max_new_tokens"):
        list(stream)
