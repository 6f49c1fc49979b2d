"""Engines that stall, server threads that are stuck, and those that only seem to be."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
    BridgeClosedError,
    EngineDeadError,
)
from lmbridge.testing import ScriptedEngine
from tests.conftest import until, until_living
from tests.server.workshop import Blocked, Threaded, Workshop, server_loop, turns

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_a_stalled_engine_is_replaced() -> None:
    """An engine that has work and says nothing for stall_timeout seconds is rebuilt; who waited is answered."""
    workshop = Workshop()
    with Bridge(workshop, stall_timeout=0.3) as bridge:
        stuck, patient = bridge.submit("never stepped"), bridge.submit("patient")
        error = stuck.exception(20)
        assert isinstance(error, EngineDeadError)
        assert error.retryable
        assert "no progress" in repr(error.__cause__)
        assert patient.result(20).text == "patient"


def test_a_stall_tells_where_the_thread_stands() -> None:
    """Whoever reads that an engine made no progress would not know which code to look at."""
    with Bridge(Threaded(), stall_timeout=0.3) as bridge:
        error = bridge.submit("never stepped").exception(20)
        assert isinstance(error, EngineDeadError)
        text = str(error.__cause__)
        assert text.startswith("no progress for 0.3 s (stall_timeout); its thread stands in ")
        assert "server/workshop.py:" in text
        assert " _wait_in_a_kernel" in text


def test_an_engine_that_cannot_say_where_it_stands() -> None:
    """A fault in where() would end the watchdog, and with it the rescue of everybody in the engine."""

    class Lost(ScriptedEngine):
        def where(self) -> str:
            raise SystemExit("nowhere")

    with Bridge(Lost(manual=True), stall_timeout=0.3) as bridge:
        error = bridge.submit("never stepped").exception(20)
        assert isinstance(error, EngineDeadError)
        assert str(error.__cause__) == "no progress for 0.3 s (stall_timeout)"


def test_an_idle_engine_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without work may be silent for as long as it likes."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.02)
    workshop = Workshop()
    with Bridge(workshop, stall_timeout=0.1) as bridge:
        looks = count_looks(bridge)
        until(lambda: len(looks) > 20)
        assert (len(workshop.built), bridge.state) == (1, "ready")


def count_looks(bridge: Bridge) -> list[float]:
    """One entry for each look of the sweep from now on."""
    sweep, looks = server_loop(bridge).sweep, list[float]()
    real = sweep._look_at_engines

    def look(now: float) -> None:
        looks.append(now)
        real(now)

    sweep._look_at_engines = look  # type: ignore[method-assign]
    return looks


def test_a_call_that_has_just_begun_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which an engine had nothing to do does not count against the next request."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine, stall_timeout=0.4) as bridge:  # the looks are farther apart than that
        looks = count_looks(bridge)
        until(lambda: looks)
        future = bridge.submit("one")
        engine.wait_for(lambda e: e.active == 1)
        seen = len(looks)
        until(lambda: len(looks) > seen)
        turns(bridge)
        assert not future.done()
        engine.step()
        assert future.result(30).text == "one"


def test_an_engine_that_blocks_the_loop_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server thread stuck in native code is named and replaced: begun calls fail, waiting and new ones are served."""
    workshop, release = Workshop(), threading.Event()
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 1.0)
    with Bridge(workshop, stall_timeout=0.3) as bridge, caplog.at_level(logging.ERROR, "lmbridge"):
        begun = bridge.submit("begun")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        stream = bridge.stream("a waiting stream")
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(bridge.infer, "waiting")
            until_living(bridge, 3)
            workshop.built[0].block(release)
            assert waiting.result(30).text == "waiting"
        error = begun.exception(30)
        assert isinstance(error, EngineDeadError)
        assert "testing/scripted.py" in str(error.__cause__)
        assert "_wait_here" in str(error.__cause__)
        assert "".join(delta.text for delta in stream) == "a waiting stream"
        assert bridge.infer("new").text == "new"
        assert bridge.submit("new future").result(10).text == "new future"
        complaint = next(text for text in map(logging.LogRecord.getMessage, caplog.records) if "stuck in" in text)
        assert "_wait_here" in complaint
        release.set()
        assert bridge.infer("still there").text == "still there"
        workshop.built[0].wait_for(lambda e: e.closed)  # its memory is free once the thread wakes up
    assert bridge.metrics.started == sum(bridge.metrics.outcomes.values()) == 6


def test_an_instance_that_blocks_the_loop_cannot_be_rebuilt(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a factory, an engine that blocks the loop ends the calls, waiting ones too, instead of holding them."""
    release = threading.Event()
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 1.0)
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), stall_timeout=0.3)
    futures = [bridge.submit("begun"), bridge.submit("waiting")]
    engine.wait_for(lambda e: e.active == 1)
    engine.block(release)
    assert all(isinstance(future.exception(30), EngineDeadError) for future in futures)
    release.set()


def test_a_thread_that_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no other thread can be started for a stuck one, everybody is told instead of waiting on."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.5)
    bridge = Bridge(Workshop(), stall_timeout=0.3).start()
    waiting = bridge.submit("never stepped")
    with Blocked(bridge):
        with monkeypatch.context() as patch:
            patch.setattr(lmbridge.server.keeper.Keeper, "_launch", refuse)
            error = waiting.exception(30)
        assert isinstance(error, BridgeClosedError)
        assert "can't start new thread" in repr(error.__cause__)
        assert bridge.state == "failed"


def refuse(keeper: object, run: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@pytest.mark.parametrize("busy", ["engine", pytest.param("loop", marks=pytest.mark.long)])
def test_a_process_that_was_stopped_goes_on(busy: str) -> None:
    """After SIGSTOP, a debugger's breakpoint or a paused container a healthy engine would be killed for its silence."""
    source = f"""
        import sys, threading, lmbridge.server.watchdog
        lmbridge.server.watchdog.LOOP_GRACE = 0.5
        built, tick = [], threading.Event()
        def build():
            built.append(ScriptedEngine(manual=True))
            return built[-1]
        def hold():
            print("running", flush=True)
            sys.stdin.readline()
        with Bridge(build, stall_timeout=3.0) as bridge:
            future = bridge.submit("one two three")
            built[0].wait_for(lambda e: e.active == 1)
            run = bridge._server_thread.keeper.run
            while not run.loop.calls.place.standstill:
                tick.wait(0.01)
            hold() if {busy!r} == "engine" else run.call_soon(hold)
            built[0].step(3)
            print(future.result(30).text, "by", len(built), "engine")
    """
    program = "from lmbridge import *\nfrom lmbridge.testing import ScriptedEngine\n" + textwrap.dedent(source)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "running\n"
        for order, seconds in ((None, 0.3), (signal.SIGSTOP, 3.5), (signal.SIGCONT, 0.2)):
            if order is not None:
                process.send_signal(order)
            with pytest.raises(subprocess.TimeoutExpired):  # it is held and says nothing: there is only time to pass
                process.wait(seconds)
        out, err = process.communicate("\n", timeout=60)
    assert out == "one two three by 1 engine\n", err
