"""How a bridge ends: drained, at once, with its thread stuck or killed, and when nobody closes it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import lmbridge.crossing.handle
import lmbridge.server.health
import lmbridge.server.keeper
import lmbridge.server.places
import lmbridge.server.run
import lmbridge.server.supervisor
import lmbridge.server.sweep
import lmbridge.server.watchdog
from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineDeadError,
)
from lmbridge.server.run import Run
from lmbridge.testing import ScriptedEngine
from tests.conftest import until, until_living
from tests.server.workshop import Blocked, Workshop, in_thread, run_script, server_loop

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_drain_covers_loading() -> None:
    """Whoever asked while the model loads was promised that close(drain=True) lets it finish."""
    gate, loading = threading.Event(), ScriptedEngine
    bridge = Bridge(lambda: loading(start_gate=gate))
    waiting = [bridge.submit("one"), bridge.submit("two")]
    closing = in_thread(lambda: bridge.close(drain=True, timeout=30))
    until(lambda: bridge.state == "draining")
    with pytest.raises(BridgeClosedError):
        bridge.infer("too late")
    gate.set()
    assert [future.result(30).text for future in waiting] == ["one", "two"]
    closing.result(30)
    assert bridge.state == "closed"


def test_drain_covers_a_rebuild() -> None:
    """A death in the middle of the drain is repaired like any other, for the sake of those who wait."""
    workshop = Workshop()
    bridge = Bridge(workshop)
    begun, patient = bridge.submit("never stepped"), bridge.submit("patient")
    until(lambda: workshop.built)
    workshop.built[0].wait_for(lambda e: e.active == 1)
    closing = in_thread(lambda: bridge.close(drain=True, timeout=30))
    until(lambda: bridge.state == "draining")
    workshop.spoiled = [MemoryError("not yet free")]
    workshop.built[0].crash(ValueError("device lost"))
    assert isinstance(begun.exception(30), EngineDeadError)
    assert patient.result(30).text == "patient"
    closing.result(30)
    assert bridge.state == "closed"


@pytest.mark.parametrize("overlap", [True, False])
def test_drain_covers_a_swap(overlap: bool) -> None:
    """Calls that a swap holds back finish as well, and the swap with them."""
    workshop, gate = Workshop(), threading.Event()
    bridge = Bridge(workshop).start()
    running = bridge.submit("begun before")
    workshop.built[0].wait_for(lambda e: e.active == 1)
    swapping = in_thread(lambda: bridge.swap(lambda: ScriptedEngine(start_gate=gate), overlap=overlap))
    until(lambda: bridge.health().reason or overlap)
    waiting = bridge.submit("held back")
    closing = in_thread(lambda: bridge.close(drain=True, timeout=30))
    until(lambda: bridge.state == "draining")
    gate.set()
    if overlap:
        swapping.result(30)
    workshop.built[0].step(2)
    assert (running.result(30).text, waiting.result(30).text) == ("begun before", "held back")
    swapping.result(30)
    closing.result(30)


def test_drain_covers_who_stands_at_the_gate() -> None:
    """Callers that a full queue holds back asked before the end, too."""
    workshop = Workshop()
    bridge = Bridge(workshop, max_pending=1)
    running = bridge.submit("one")
    until(lambda: workshop.built)
    workshop.built[0].wait_for(lambda e: e.active == 1)
    queued = bridge.submit("two")
    standing = [in_thread(lambda: bridge.infer("three").text), in_thread(lambda: bridge.infer("four").text)]
    until_living(bridge, 4)
    closing = in_thread(lambda: bridge.close(drain=True, timeout=30))
    until(lambda: bridge.state == "draining")
    for _ in range(4):
        workshop.built[0].wait_for(lambda e: e.active == 1)
        workshop.built[0].step()
    closing.result(30)
    assert [future.result(30).text for future in (running, queued)] == ["one", "two"]
    assert [call.result(30) for call in standing] == ["three", "four"]


def test_a_drain_that_takes_too_long_while_loading() -> None:
    """The time given is a limit whatever the engine is at; who waits is told then, and not when it is loaded."""
    engine = ScriptedEngine(start_gate=threading.Event())
    bridge = Bridge(lambda: engine)
    waiting = bridge.submit("hello")
    bridge.close(drain=True, timeout=0.1)
    assert isinstance(waiting.exception(30), BridgeClosedError)
    assert engine.closed


def test_close_ends_a_drain() -> None:
    """Whoever has waited long enough for a drain closes again, without one."""
    engine = ScriptedEngine(manual=True)
    bridge = Bridge(lambda: engine).start()
    running = bridge.submit("never stepped")
    engine.wait_for(lambda e: e.active == 1)
    draining = in_thread(lambda: bridge.close(drain=True, timeout=600))
    until(lambda: bridge.state == "draining")
    bridge.close()
    draining.result(30)
    assert isinstance(running.exception(30), BridgeClosedError)


def test_a_drain_ends_with_an_engine_that_stays_down() -> None:
    """Nothing can finish any more once the engine is dead for good: the rest of the time is not waited for."""
    engine = ScriptedEngine(manual=True, max_batch_size=1)
    bridge = Bridge(engine).start()
    calls = [bridge.submit("begun"), bridge.submit("waiting")]
    engine.wait_for(lambda e: e.active == 1)
    closing = in_thread(lambda: bridge.close(drain=True, timeout=600))
    until(lambda: bridge.state == "draining")
    engine.crash(ValueError("device lost"))
    closing.result(30)
    assert all(isinstance(call.exception(30), EngineDeadError) for call in calls)


# --- a thread that is stuck ---


@pytest.fixture
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time for engines to close and for the loop to answer."""
    monkeypatch.setattr(lmbridge.server.places, "CLOSE_GRACE", 0.2)
    monkeypatch.setattr(lmbridge.server.keeper, "MARGIN", 0.2)
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.3)


@pytest.mark.parametrize("drain", [True, False])
def test_close_with_the_loop_stuck(short_graces: None, drain: bool) -> None:
    """Callers whose server thread never comes back would wait for ever, past close(), and health would say ready."""
    engine = ScriptedEngine(manual=True, max_batch_size=1)
    bridge = Bridge(lambda: engine, stall_timeout=None).start()
    futures = [bridge.submit("running"), bridge.submit("waiting")]
    calls = [in_thread(lambda: bridge.infer("a thread")), in_thread(lambda: asyncio.run(bridge.ainfer("a task")))]
    engine.wait_for(lambda e: e.active == 1)
    until_living(bridge, 4)
    with Blocked(bridge):
        bridge.close(drain=drain, timeout=0.1)
        for ended in [*futures, *calls]:
            error = ended.exception(30)
            assert isinstance(error, BridgeClosedError)
            assert "_stand_still" in str(error)
        health = bridge.health()
        assert (health.state, health.waiting, health.running) == ("closed", 0, 0)
        assert "is stuck in" in health.reason
        with pytest.raises(BridgeClosedError):
            bridge.infer("too late")
    until_no_server_thread()  # it woke up
    engine.wait_for(lambda e: e.closed)
    assert bridge.metrics.started == sum(bridge.metrics.outcomes.values()) == 4
    assert (bridge.state, bridge.health().reason) == ("closed", health.reason)


def test_a_close_does_not_outwait_the_watchdog(short_graces: None) -> None:
    """With minutes given for the drain, those who wait on a stuck thread would wait as long."""
    engine = ScriptedEngine(manual=True)
    bridge = Bridge(lambda: engine, stall_timeout=0.5).start()
    running = bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    with Blocked(bridge):
        closing = in_thread(lambda: bridge.close(drain=True, timeout=600))
        assert isinstance(running.exception(30), BridgeClosedError)
        closing.result(30)
        assert bridge.state == "closed"
    until_no_server_thread()


def test_an_engine_that_will_not_close(
    short_graces: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that hangs while it loads and again while it closes holds up the end no longer than one grace."""
    monkeypatch.setattr(lmbridge.server.run, "LEFTOVERS", 0.01)
    monkeypatch.setattr(lmbridge.server.places, "CLOSE_GRACE", 1.0)

    class Hangs(ScriptedEngine):
        async def start(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await super().start()
            await asyncio.sleep(3600)

        async def close(self) -> None:
            await asyncio.sleep(3600)

    engine = Hangs(start_gate=threading.Event())
    bridge = Bridge(engine)
    waiting = bridge.submit("hello")
    engine.wait_for(lambda e: e._loop is not None)
    bridge.close()
    assert isinstance(waiting.exception(30), BridgeClosedError)
    assert bridge.state == "closed"
    assert "left behind" not in caplog.text  # the engine is; its thread has ended
    until_no_server_thread()


GIVEN_UP = """
    import logging, sys, threading
    import lmbridge.server.keeper, lmbridge.server.places
    from lmbridge import Bridge
    from lmbridge.testing import ScriptedEngine
    lmbridge.server.keeper.MARGIN = lmbridge.server.places.CLOSE_GRACE = 0.2
    logging.getLogger("lmbridge").setLevel(logging.ERROR)  # which warns that the thread was left behind
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # and asyncio, that it stood for long
    engine, release = ScriptedEngine(manual=True), threading.Event()
    bridge = Bridge(engine, stall_timeout=None)
    future = bridge.submit("never stepped")
    engine.wait_for(lambda e: e.active == 1)
    server = bridge._server_thread
    if sys.argv[1] == "stuck in the drain":
        server.handle.run_soon(lambda: bridge.close(drain=True, timeout=60))  # there it does not wait
        for _ in range(3):
            server.handle.ask(lambda: None)
    if sys.argv[1] != "at work":
        engine.block(release)
    bridge.close(drain=True, timeout=0.1)
    release.set()
    server.keeper.run.thread.join()
    print(type(future.exception()).__name__, bridge.state, engine.closed)
"""


@pytest.mark.parametrize("server", ["at work", "stuck in the drain", "stuck before the drain"])
def test_a_drain_that_is_given_up_leaves_nothing(server: str) -> None:
    """In development mode close() raised when it gave the drain up, or the bridge said that its thread had failed."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(GIVEN_UP), server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "BridgeClosedError closed True\n", "")


# --- from everywhere ---


def test_close_from_the_server_thread() -> None:
    """An engine's own code may close the bridge: it must not wait for itself."""
    bridge, came = Bridge(ScriptedEngine).start(), list[str]()

    def close() -> None:
        bridge.close()
        came.append("through")

    bridge._server_thread.handle.run_soon(close)
    until(lambda: bridge.state == "closed")
    until_no_server_thread()
    assert came == ["through"]


def test_close_from_many_threads_at_once() -> None:
    """Whoever closes, and however many do, each returns when it is done."""
    for _ in range(20):
        bridge, together = Bridge(ScriptedEngine).start(), threading.Barrier(8)

        def close(bridge: Bridge = bridge, together: threading.Barrier = together) -> str:
            together.wait(30)
            bridge.close()
            return bridge.state

        assert {call.result(30) for call in [in_thread(close) for _ in range(8)]} == {"closed"}


def test_what_can_be_asked_of_a_closed_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """stats() on a closed bridge waited a second for a loop that does not run."""
    monkeypatch.setattr(lmbridge.crossing.handle, "ASK_PATIENCE", 3600.0)
    with Bridge(ScriptedEngine) as bridge:
        bridge.infer("hello")
    asked = in_thread(lambda: (bridge.stats(), bridge.token_texts([1]), bridge.supports(), bridge.requests()))
    assert asked.result(30) == ({}, [""], frozenset(), [])


def test_everybody_is_told_before_the_engines_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes its time to close would hold up callers, whoever waits for a swap, and whoever looks."""
    monkeypatch.setattr(lmbridge.crossing.handle, "ASK_PATIENCE", 3600.0)
    closing, release = threading.Event(), asyncio.Event()

    class Slow(ScriptedEngine):
        async def close(self) -> None:
            closing.set()
            await release.wait()
            await super().close()

    slow, loading = Slow(manual=True, max_batch_size=1), ScriptedEngine(start_gate=threading.Event())
    bridge = Bridge(lambda: slow).start()
    futures = [bridge.submit("running"), bridge.submit("waiting")]
    slow.wait_for(lambda e: e.active == 1)
    swapping = in_thread(lambda: bridge.swap(lambda: loading))
    loading.wait_for(lambda e: e._loop is not None)
    ending = in_thread(bridge.close)
    assert closing.wait(30)
    assert all(isinstance(future.exception(30), BridgeClosedError) for future in futures)
    assert isinstance(swapping.exception(30), BridgeClosedError)
    assert in_thread(bridge.stats).result(30) == {}
    assert (bridge.state, ending.done()) == ("draining", False)
    bridge._server_thread.handle.run_soon(release.set)
    ending.result(30)
    assert (bridge.state, slow.closed) == ("closed", True)


def test_calls_that_race_close() -> None:
    """Whoever calls while somebody closes gets an answer or BridgeClosedError, and never hangs."""
    for _ in range(50):
        bridge = Bridge(ScriptedEngine)
        bridge.start()
        go = threading.Barrier(5)

        def ask(bridge: Bridge = bridge, go: threading.Barrier = go) -> bool:
            go.wait()
            try:
                while True:
                    assert bridge.infer("racing", timeout=30).text == "racing"
            except BridgeClosedError:
                return True

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            go.wait()
            bridge.close()
            assert all(call.result(30) for call in asking)


def test_a_killed_server_thread_holds_nobody(scripted: Scripted) -> None:
    """An exception thrown into the server thread ends every waiting and every later call, with the cause chained."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    futures = [bridge.submit(f"number {number}") for number in range(3)]
    stream = bridge.stream("a stream")
    engine.wait_for(lambda e: e.active == 4)
    server = bridge._server_thread.server(True)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(server.thread_id or 0), ctypes.py_object(SystemExit))
    server.run_soon(lambda: None)  # it strikes at the thread's next bytecode
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, BridgeClosedError) for error in errors)
    assert isinstance(errors[0].__cause__, SystemExit) if errors[0] is not None else False
    with pytest.raises(BridgeClosedError):
        next(stream)
    with pytest.raises(BridgeClosedError, match="server thread"):
        bridge.infer("later")
    engine.wait_for(lambda e: e.closed)
    assert bridge.supports() == frozenset()  # nothing holds it any more
    assert bridge.health().state == "failed"


def test_a_server_thread_that_is_killed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What strikes the thread in the middle of its end must not leave callers behind: the watchdog ends them then."""
    engine = ScriptedEngine(manual=True)
    bridge = Bridge(engine).start()
    waiting = bridge.submit("never stepped")
    engine.wait_for(lambda e: e.active == 1)
    keeper, real = bridge._server_thread.keeper, bridge._server_thread.keeper._end

    def end(run: Run, cause: BaseException) -> None:
        if threading.current_thread() is run.thread:
            raise SystemExit
        real(run, cause)

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(keeper, "_end", end)
    bridge._server_thread.handle.run_soon(server_loop(bridge).loop.stop)
    assert isinstance(waiting.exception(30), BridgeClosedError)
    assert bridge.state == "failed"


def test_an_exit_while_bridges_come_to_their_end() -> None:
    """The exit handler goes through what still runs, while threads take out what has just ended."""
    done = run_script("""
        import sys, threading
        sys.setswitchinterval(1e-6)
        bridges = [Bridge(ScriptedEngine).start() for _ in range(60)]
        for bridge in bridges[::2]:
            threading.Thread(target=bridge.close, daemon=True).start()
    """)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_an_exit_with_several_bridges_open() -> None:
    """Bridges that nobody closed end together: one after another, each would hold up the exit for its own time."""
    done = run_script("""
        import os, threading
        together = threading.Barrier(4)
        class Sociable(ScriptedEngine):
            async def close(self):
                together.wait(5)  # all have been told before any is waited for
                await super().close()
                os.write(1, b"closed ")
        bridges = [Bridge(Sociable(manual=True)).start() for _ in range(4)]
        futures = [bridge.submit("never answered") for bridge in bridges]
    """)
    assert (done.returncode, done.stdout) == (0, "closed " * 4)
    assert done.stderr == ""


def until_no_server_thread() -> None:
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "lmbridge server"])


@pytest.mark.parametrize("drain", [True, False])
def test_ctrl_c_while_close_waits(drain: bool) -> None:
    """It must not cost those who are served their answers, nor leave an engine that no close() ever ends."""
    release = threading.Event()

    class Slow(ScriptedEngine):
        async def close(self) -> None:
            await asyncio.to_thread(release.wait, 60)
            await super().close()

    engine = Slow(manual=True)
    bridge = Bridge(engine)
    future = bridge.submit("one two")
    engine.wait_for(lambda e: e.active == 1)

    def interrupt() -> None:
        until(lambda: bridge.state in ("draining", "closed") or future.done())
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        bridge.close(drain=drain, timeout=60)
    interrupter.join()
    if drain:
        assert bridge.state == "draining"
        engine.step(2)
        assert future.result(30).text == "one two"
    else:
        assert isinstance(future.exception(30), BridgeClosedError)
    release.set()
    bridge.close()
    assert engine.closed
    assert bridge.state == "closed"
    assert [thread.name for thread in threading.enumerate() if thread.name == "lmbridge server"] == []


def test_a_generator_that_an_engine_leaves_behind() -> None:
    """One whose clean-up never ends would hold the server thread, and whoever closes, for good."""
    left: list[AsyncIterator[int]] = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.Event().wait()

    class Untidy(ScriptedEngine):
        async def start(self) -> None:
            left.append(endless())
            await anext(left[0])
            await super().start()

    bridge = Bridge(Untidy())
    assert bridge.infer("x", timeout=30).text == "x"
    bridge.close(timeout=1.0)
    until(lambda: [thread.name for thread in threading.enumerate() if thread.name == "lmbridge server"] == [])
