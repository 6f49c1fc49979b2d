"""The first start, interrupted and failed, and the loads that follow a death."""

from __future__ import annotations

import _thread
import ctypes
import importlib
import os
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from tests.conftest import until
from tests.server.workshop import Workshop, in_thread, turns

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_one_server_however_many_ask_first() -> None:
    """Threads that make the first call together would each load a model."""
    workshop, together = Workshop(manual=False, max_batch_size=64), threading.Barrier(32)

    def ask() -> str:
        together.wait(30)
        return bridge.infer("hello").text

    with ThreadPoolExecutor(32) as pool:
        bridge = Bridge(workshop)
        assert {call.result(30) for call in [pool.submit(ask) for _ in range(32)]} == {"hello"}
        bridge.close()
    assert len(workshop.built) == 1


class Thrown(BaseException):
    """What is thrown in."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_the_thread_starts(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Ctrl-C at that moment left a server that nobody knew, and that outlived close(); the next call loaded another."""
    workshop, real = Workshop(manual=False), _thread.start_new_thread

    def start(*args: Any) -> None:
        monkeypatch.undo()
        if when == "after":
            real(*args)
            until(lambda: workshop.built)
        raise Thrown

    monkeypatch.setattr(_thread, "start_new_thread", start)
    bridge = Bridge(workshop)
    with pytest.raises(Thrown):
        bridge.infer("never sent")
    assert bridge.infer("hello").text == "hello"
    bridge.close()
    assert [engine.closed for engine in workshop.built] == [True]
    assert not [thread for thread in threading.enumerate() if thread.name == "lmbridge server"]


def test_an_interrupt_before_the_thread_starts_and_a_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """close() after such a Ctrl-C waited for a thread that was never there, or raised."""

    def start(*args: Any) -> None:
        raise Thrown

    bridge = Bridge(ScriptedEngine)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    with pytest.raises(Thrown):
        bridge.start()
    monkeypatch.undo()
    bridge.close()
    assert bridge.state == "closed"
    with pytest.raises(BridgeClosedError):
        bridge.infer("too late")


def test_a_close_in_the_middle_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that closes while the main thread starts the server must neither lock up nor leave it there."""
    workshop, real = Workshop(), _thread.start_new_thread

    def start(*args: Any) -> None:
        monkeypatch.undo()
        bridge.close()
        real(*args)

    bridge = Bridge(workshop)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    with pytest.raises(BridgeClosedError):
        bridge.infer("hello", timeout=30)
    assert (bridge.state, workshop.built) == ("closed", [])


@pytest.mark.parametrize("seed", [1, 2])
def test_starts_interrupted_at_random(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Wherever an exception strikes whoever starts, the next call is served by one engine, and close() ends it."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # it is thrown into finalizers too
    before, chance = sys.getswitchinterval(), random.Random(seed)
    sys.setswitchinterval(1e-5)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(lmbridge.server.keeper, "SLICE", 0.02)  # it strikes the thread that starts the server, too
    struck = 0
    try:
        for _ in range(150):
            struck += start_and_strike(chance)
    finally:
        sys.setswitchinterval(before)
    assert struck > 20


def start_and_strike(chance: random.Random) -> bool:
    """Start a bridge on another thread and throw something in; whether it struck before the start was through."""
    workshop, running, came = Workshop(manual=False), threading.Event(), list[str]()
    bridge = Bridge(workshop)

    def start() -> None:
        running.set()
        bridge.start()
        came.append("through")

    starter = threading.Thread(target=start, daemon=True)
    starter.start()
    assert running.wait(30)
    for _ in range(chance.randrange(12)):
        os.sched_yield()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(starter.ident or 0), ctypes.py_object(Thrown))
    starter.join(30)
    assert not starter.is_alive()
    assert bridge.infer("hello", timeout=30).text == "hello"
    bridge.close()
    assert [engine.closed for engine in workshop.built] == [True]
    return not came


def test_a_start_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception thrown into an import leaves its lock held, and everybody's next start would hang on that."""

    def fail(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with Bridge(ScriptedEngine) as bridge:
        assert bridge.infer("hello").text == "hello"


def test_start_while_somebody_closes() -> None:
    """Whoever waits in start() for a model that will not come is told so at once."""
    bridge = Bridge(lambda: ScriptedEngine(start_gate=threading.Event()))
    starting = in_thread(bridge.start)
    until(lambda: bridge.state == "starting")
    bridge.close()
    assert isinstance(starting.exception(30), BridgeClosedError)


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process may have no more threads the first call says so, and a later one works."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("lmbridge"):
            raise RuntimeError("can't start new thread")
        real(thread)

    bridge = Bridge(ScriptedEngine)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", start)
        bridge.infer("hello")
    assert bridge.infer("hello").text == "hello"
    bridge.close()


# --- after a death ---


def test_a_load_that_fails_after_a_death_is_tried_again() -> None:
    """What the dead engine held in memory is not free at once; giving up at the first failed load ended everything."""
    workshop = Workshop()
    with Bridge(workshop) as bridge:
        begun = bridge.submit("never stepped")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        workshop.spoiled = [MemoryError("out of memory")]
        waiting = bridge.submit("patient")
        workshop.built[0].crash(ValueError("device lost"))
        assert isinstance(begun.exception(30), EngineDeadError)
        assert waiting.result(30).text == "patient"
        assert (len(workshop.built), bridge.health().restarts) == (3, 1)
        assert workshop.built[1].closed


def test_loads_that_keep_failing_end_in_a_refusal() -> None:
    """An engine that cannot be loaded any more must not be tried for ever, nor its callers kept waiting."""
    workshop = Workshop(manual=False)
    with Bridge(workshop) as bridge:
        workshop.spoiled = [MemoryError("out of memory")] * 2
        workshop.built[0].crash(ValueError("device lost"))
        turns(bridge)
        with pytest.raises(EngineDeadError, match=r"again: MemoryError.*lost 3 times .* stays down") as caught:
            bridge.infer("hello", timeout=30)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert "Bridge" not in str(caught.value)  # whoever reads it may sit at a command line
        assert bridge.state == "failed"


def test_many_deaths_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before the next load doubles and doubles; it must not grow past every number, nor past a minute."""
    monkeypatch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", 10**9)
    assert lmbridge.server.supervisor._backoff(1) == 0.1
    assert lmbridge.server.supervisor._backoff(10_000) == 60.0
    monkeypatch.setattr(lmbridge.server.supervisor, "FIRST_BACKOFF", 0.0)
    assert lmbridge.server.supervisor._backoff(10_000) == 0.0


def test_a_broken_device_is_not_tried_again() -> None:
    """A device error that sticks to the process is told as such, with the advice to restart it."""
    workshop = Workshop()
    with Bridge(workshop) as bridge:
        future = bridge.submit("begun")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        workshop.built[0].crash(RuntimeError("CUDA error: device-side assert triggered"))
        assert isinstance(future.exception(10), EngineDeadError)
        with pytest.raises(EngineDeadError, match="restart the process"):
            bridge.infer("again", timeout=10)
        assert len(workshop.built) == 1


def test_a_cause_that_is_its_own_cause() -> None:
    """``raise error from error`` makes a chain without an end, on which the server thread would hang for good."""
    workshop, cause = Workshop(manual=False), ValueError("device lost")
    cause.__cause__ = cause
    with Bridge(workshop) as bridge:
        workshop.built[0].crash(cause)
        turns(bridge)
        assert bridge.infer("and on", timeout=30).text == "and on"
