"""Engines that are exchanged under load, beside a stall or a death, or in vain."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections import deque
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
    EngineStartError,
    InvalidRequestError,
    RequestTimeoutError,
)
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.server.workshop import Blocked, Workshop, in_thread, server_loop, turns

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


@pytest.mark.parametrize("overlap", [True, False])
def test_swap_under_load(overlap: bool) -> None:
    """The model is exchanged under a steady load of 32 threads, and no request fails."""
    old, new = (lambda: ScriptedEngine(lambda r: ["old"])), (lambda: ScriptedEngine(lambda r: ["new"]))
    swapped, answered = threading.Event(), threading.Event()

    def ask(_: int) -> set[str]:
        said = set()
        while not swapped.is_set():
            said.add(bridge.infer("which one?", timeout=30).text)
            answered.set()
        said.add(bridge.infer("and now?").text)
        return said

    with Bridge(old) as bridge, ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask, number) for number in range(32)]
        assert answered.wait(30)
        bridge.swap(new, overlap=overlap, timeout=30)
        swapped.set()
        answers = [call.result(60) for call in asking]
        assert all(said <= {"old", "new"} for said in answers)
        assert bridge.infer("finally?").text == "new"


def test_swap_lets_what_runs_finish_and_frees_the_old_engine(scripted: Scripted) -> None:
    """A request begun on the old engine is answered by it, after the new one has begun to serve."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    running = bridge.submit("begun before")
    engine.wait_for(lambda e: e.active == 1)
    bridge.swap(lambda: ScriptedEngine(lambda r: ["new engine"]))
    assert bridge.infer("after").text == "new engine"
    engine.step(2)
    assert running.result(10).text == "begun before"
    engine.wait_for(lambda e: e.closed)
    assert "lambda" in repr(bridge)


def test_a_swapped_out_engine_is_freed() -> None:
    """Nothing holds the old model once its last request has ended."""
    with Bridge(ScriptedEngine) as bridge:
        bridge.infer("hello")
        place = server_loop(bridge).calls.place
        assert place is not None
        freed = threading.Event()
        weakref.finalize(place.engine, freed.set)
        del place
        bridge.swap(ScriptedEngine)
        until(lambda: gc.collect() >= 0 and freed.is_set())


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_swap_changes_nothing(overlap: bool) -> None:
    """When the new model cannot be loaded, whoever asked is told and the old one serves on."""
    with Bridge(lambda: ScriptedEngine(lambda r: ["old"])) as bridge:
        with pytest.raises(EngineStartError, match="no weights"):
            bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")), overlap=overlap)
        assert bridge.infer("who?").text == "old"
        assert bridge.state == "ready"


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_swap_says_what_serves_now(overlap: bool) -> None:
    """Whoever reads it has to know whether anything serves; building a new Bridge is no advice at a command line."""
    workshop = Workshop(manual=False)
    with Bridge(workshop) as bridge:
        with pytest.raises(EngineStartError, match=r"could not be loaded: no weights\. The old model keeps serving\.$"):
            bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")), overlap=overlap)
        assert bridge.health().reason == ""


def test_a_failed_swap_of_an_engine_that_is_down() -> None:
    """Where nothing serves, a swap that fails too must not say that the old model goes on."""
    bridge = Bridge(lambda: ScriptedEngine(start_error=OSError("broken")))
    with pytest.raises(EngineStartError, match=r"could not be loaded: broken\. Fix this, then restart\.$"):
        bridge.start()
    with pytest.raises(EngineStartError, match=r"no weights\. No model is serving: fix this, then swap again\.$"):
        bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")))
    bridge.close()


def test_a_swap_in_vain_brings_the_old_engine_back_in_time() -> None:
    """The memory of the model that failed is not free at once: one more load that fails must not end everything."""
    workshop = Workshop(manual=False)
    with Bridge(workshop) as bridge:
        workshop.spoiled = [MemoryError("out of memory")]
        with pytest.raises(EngineStartError, match=r"no weights\. The old model keeps serving\.$"):
            bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")), overlap=False)
        assert bridge.infer("and on", timeout=30).text == "and on"
        assert len(workshop.built) == 3


def test_a_swap_in_place_says_what_holds_the_calls() -> None:
    """Callers that wait for a swap would be told to give a longer timeout, and nobody why nothing moves."""
    workshop = Workshop()
    with Bridge(workshop) as bridge:
        running = bridge.submit("one")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        swapping = in_thread(lambda: bridge.swap(ScriptedEngine, overlap=False))
        until(lambda: bridge.health().reason)
        assert bridge.health().reason == "a swap is waiting for running requests to finish"
        with pytest.raises(RequestTimeoutError, match=r"in the queue \(a swap is waiting for running requests"):
            bridge.infer("two", timeout=0.1)
        workshop.built[0].step()
        assert running.result(30).text == "one"
        swapping.result(30)
        assert (bridge.state, bridge.health().reason) == ("ready", "")


def test_a_swap_in_place_is_not_ready_while_it_loads() -> None:
    """A load balancer would send requests to a bridge that has no model at the moment."""
    loading = ScriptedEngine(start_gate=threading.Event())
    with Bridge(Workshop(manual=False)) as bridge:
        swapping = in_thread(lambda: bridge.swap(lambda: loading, overlap=False))
        loading.wait_for(lambda e: e._loop is not None)
        health = bridge.health()
        assert (health.state, health.reason) == ("starting", "a swap is loading the new model")
        assert loading._start_gate is not None
        loading._start_gate.set()
        swapping.result(30)
        assert bridge.state == "ready"


def test_an_engine_that_dies_during_a_swap_that_fails() -> None:
    """The old engine, dead meanwhile, would be kept: no engine any more, and callers who wait for ever."""
    gate, workshop = threading.Event(), Workshop(manual=False)
    broken = ScriptedEngine(start_gate=gate, start_error=OSError("no weights"))
    with Bridge(workshop) as bridge:
        swapping = in_thread(lambda: bridge.swap(lambda: broken))
        broken.wait_for(lambda e: e._loop is not None)
        workshop.built[0].crash(ValueError("device lost"))
        turns(bridge)
        assert bridge.state == "restarting"
        waiting = in_thread(lambda: bridge.infer("and on"))
        gate.set()
        error = swapping.exception(30)
        assert isinstance(error, EngineStartError)
        assert str(error).endswith("The old model has died meanwhile and is being reloaded.")
        assert waiting.result(30).text == "and on"
        assert bridge.health().state == "ready"


@pytest.mark.parametrize("end", ["stall", "crash"])
@pytest.mark.parametrize("fails", [True, False])
def test_an_engine_that_ends_while_a_swap_loads(monkeypatch: pytest.MonkeyPatch, end: str, fails: bool) -> None:
    """Whoever is in the old engine when it stalls or dies during a swap would wait until the new one is loaded."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.02)
    gate, workshop = threading.Event(), Workshop()
    new = ScriptedEngine(start_gate=gate, start_error=OSError("no weights") if fails else None)
    with Bridge(workshop, stall_timeout=0.3) as bridge:
        inside = bridge.submit("never stepped")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        swapping = in_thread(lambda: bridge.swap(lambda: new))
        new.wait_for(lambda e: e._loop is not None)
        getattr(workshop.built[0], end)(*[ValueError("device lost")] * (end == "crash"))
        assert isinstance(inside.exception(30), EngineDeadError)
        waiting = in_thread(lambda: bridge.infer("and on"))
        gate.set()
        assert isinstance(swapping.exception(30), EngineStartError) == fails
        assert waiting.result(30).text == "and on"
        workshop.built[0].wait_for(lambda e: e.closed)


def test_swap_in_place_gives_up_when_work_does_not_end(scripted: Scripted) -> None:
    """overlap=False waits for what runs only as long as it was told; then the old model serves on."""
    engines: list[ScriptedEngine] = []

    def factory() -> ScriptedEngine:
        engines.append(ScriptedEngine(manual=True))
        return engines[-1]

    with Bridge(factory) as bridge:
        running = bridge.submit("long")
        engines[0].wait_for(lambda e: e.active == 1)
        with pytest.raises(RequestTimeoutError):
            bridge.swap(ScriptedEngine, overlap=False, timeout=0.1)
        engines[0].step()
        assert running.result(10).text == "long"


def test_swap_in_place_needs_a_way_back(scripted: Scripted) -> None:
    """overlap=False is refused where a failed load could not bring the old engine back."""
    bridge, _ = scripted()
    bridge.start()
    with pytest.raises(InvalidRequestError, match="overlap=True"):
        bridge.swap(ScriptedEngine, overlap=False)


def test_swap_before_the_start_and_after_a_failure() -> None:
    """A bridge that has not started takes the new model without loading the old; one that is down comes back."""
    bridge = Bridge(lambda: ScriptedEngine(start_error=OSError("broken")))
    bridge.swap(lambda: ScriptedEngine(start_error=OSError("broken too")))
    with pytest.raises(EngineStartError, match="broken too"):
        bridge.start()
    bridge.swap(ScriptedEngine)
    assert bridge.infer("back").text == "back"
    assert bridge.start().state == "ready"  # and no more of what had been wrong
    bridge.close()


@pytest.mark.parametrize("end", [Bridge.close, lambda bridge: bridge._server_thread.handle.loop.stop()])
def test_a_swap_ends_with_its_server_thread(end: Callable[[Bridge], None]) -> None:
    """Whoever waits for a swap is told when the bridge is closed, or its loop stopped, while the new model loads."""
    bridge, loading = Bridge(ScriptedEngine), ScriptedEngine(start_gate=threading.Event())
    bridge.start()
    swapping, next_one = in_thread(lambda: bridge.swap(lambda: loading)), in_thread(lambda: bridge.swap(ScriptedEngine))
    loading.wait_for(lambda e: e._loop is not None)
    end(bridge)
    turns(bridge)
    assert isinstance(swapping.exception(30), BridgeClosedError)
    assert isinstance(next_one.exception(30), BridgeClosedError)
    loading.wait_for(lambda e: e.closed)
    with pytest.raises(BridgeClosedError):
        bridge.swap(ScriptedEngine)


def test_a_swap_that_nobody_hears_of_is_asked_again(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up that is lost on the way to the loop costs a second, and not the whole wait."""
    bridge, _ = scripted()
    bridge.start()
    run, calls = bridge._server_thread.keeper.run, list[object]()
    assert run is not None
    real = run.call_soon

    def call_soon(function: Callable[[], object]) -> None:
        calls.append(function)
        if len(calls) > 1:
            real(function)

    monkeypatch.setattr(run, "call_soon", call_soon)
    bridge.swap(lambda: ScriptedEngine(lambda request: ["new"]))
    monkeypatch.undo()
    assert len(calls) >= 2
    assert bridge.infer("who?").text == "new"


def test_a_swap_asked_of_a_stuck_thread_is_taken_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that lies on a loop which never runs again would be waited for without end, even past close()."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 1.0)
    with Bridge(Workshop(manual=False), stall_timeout=0.3) as bridge:
        bridge.infer("hello")
        with Blocked(bridge):
            bridge.swap(lambda: ScriptedEngine(lambda request: ["new"]))
            assert bridge.infer("who?").text == "new"


def test_a_swap_asked_of_a_stuck_thread_that_nobody_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a watchdog a swap that was not begun is taken back, and whoever asked is told where the thread stands."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.5)
    workshop = Workshop(manual=False)
    with Bridge(workshop, stall_timeout=None) as bridge:
        bridge.infer("hello")
        with (
            Blocked(bridge),
            pytest.raises(RequestTimeoutError, match="for 1 s, so the swap did not begin"),
        ):
            bridge.swap(lambda: ScriptedEngine(lambda request: ["new"]))
        assert bridge.infer("who?").text == "who?"
        assert len(workshop.built) == 1


def test_a_swap_under_way_when_the_thread_gets_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that blocks the loop while it loads would hold whoever asked for it, and everybody else."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.5)
    release = threading.Event()

    class Native(ScriptedEngine):
        async def start(self) -> None:
            release.wait(60)

    with Bridge(Workshop(manual=False), stall_timeout=0.3) as bridge:
        with pytest.raises(EngineStartError, match="Request the swap again"):
            bridge.swap(Native)
        assert bridge.infer("still the old one").text == "still the old one"
        release.set()


def test_a_swap_begun_by_a_thread_that_was_just_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was slow rather than stuck, and nobody else knows of the swap: whoever asked would wait until the close."""
    monkeypatch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", 0.5)
    bridge = Bridge(Workshop(manual=False), stall_timeout=0.3)

    class Slow(deque[Any]):
        def append(self, swap: Any) -> None:
            if len(threads) == 1:
                threads.append(threading.get_ident())
                until(lambda: bridge._server_thread.handle.thread_id != threads[0])
            super().append(swap)

    with bridge:
        threads = [bridge._server_thread.handle.thread_id]
        bridge._server_thread.keeper.swaps._begun = Slow()
        with pytest.raises(EngineStartError, match="Request the swap again"):
            in_thread(lambda: bridge.swap(ScriptedEngine)).result(30)
        bridge.swap(ScriptedEngine)
        assert bridge.infer("and on", timeout=30).text == "and on"


def test_whoever_leaves_a_swap_takes_it_back() -> None:
    """A swap that was interrupted before it began would exchange the model behind everybody's back."""

    class Thrown(BaseException):
        pass

    gate, began = threading.Event(), threading.Event()
    bridge = Bridge(lambda: ScriptedEngine(lambda request: ["old"], start_gate=gate))
    early = bridge.submit("who?")
    idents = []

    def swap() -> None:
        idents.append(threading.get_ident())
        began.set()
        bridge.swap(lambda: ScriptedEngine(lambda request: ["new"]))

    swapping = in_thread(swap)
    assert began.wait(30)
    until(lambda: bridge._server_thread.keeper.swaps)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(idents[0]), ctypes.py_object(Thrown))
    assert isinstance(swapping.exception(30), Thrown)
    gate.set()
    assert early.result(30).text == "old"
    assert bridge.infer("who?").text == "old"
    bridge.close()


def test_an_engine_that_retires_is_closed_with_the_bridge() -> None:
    """What an exchanged engine has not finished ends with close(), and the engine with it."""
    workshop = Workshop()
    bridge = Bridge(workshop).start()
    inside = bridge.submit("never stepped")
    workshop.built[0].wait_for(lambda e: e.active == 1)
    bridge.swap(ScriptedEngine)
    assert not workshop.built[0].closed
    bridge.close()
    assert isinstance(inside.exception(30), BridgeClosedError)
    assert workshop.built[0].closed
