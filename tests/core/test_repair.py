"""Engines that stall, block or are exchanged, while callers go on."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineDeadError,
    EngineStartError,
    InvalidRequestError,
    RequestTimeoutError,
)
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


class Workshop:
    """A factory whose first engine makes no step by itself, and the engines it has built."""

    def __init__(self) -> None:
        self.built: list[ScriptedEngine] = []

    def __call__(self) -> ScriptedEngine:
        self.built.append(ScriptedEngine(manual=not self.built, max_batch_size=1))
        return self.built[-1]


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


def test_an_idle_engine_is_not_stalled() -> None:
    """An engine without work may be silent for as long as it likes."""
    workshop = Workshop()
    with Bridge(workshop, stall_timeout=0.1) as bridge:
        watching = threading.Event()
        server = bridge._host.server(True)
        for _ in range(3):  # three of its sweeps are many of the watchdog's looks
            before = server.heartbeat
            while server.heartbeat == before:
                watching.wait(0.01)
        assert len(workshop.built) == 1
        assert bridge.state == "ready"


def test_an_engine_that_blocks_the_loop_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """A server thread stuck in native code is named and replaced: begun calls fail, waiting and new ones are served."""
    workshop = Workshop()
    release = threading.Event()
    with Bridge(workshop, stall_timeout=0.3) as bridge, caplog.at_level(logging.ERROR, "lmbridge"):
        begun = bridge.submit("begun")
        workshop.built[0].wait_for(lambda e: e.active == 1)
        stream = bridge.stream("a waiting stream")
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(bridge.infer, "waiting")
            while len(bridge.requests()) < 3:
                pass
            workshop.built[0].block(release)
            assert waiting.result(30).text == "waiting"
        assert isinstance(begun.exception(30), EngineDeadError)
        assert "".join(delta.text for delta in stream) == "a waiting stream"
        assert bridge.infer("new").text == "new"
        assert bridge.submit("new future").result(10).text == "new future"
        complaint = next(text for text in map(logging.LogRecord.getMessage, caplog.records) if "stuck in" in text)
        assert "_wait_here" in complaint
        release.set()
        assert bridge.infer("still there").text == "still there"


def test_an_instance_that_blocks_the_loop_cannot_be_rebuilt(scripted: Scripted) -> None:
    """Without a factory, an engine that blocks the loop ends the calls, waiting ones too, instead of holding them."""
    release = threading.Event()
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), stall_timeout=0.3)
    futures = [bridge.submit("begun"), bridge.submit("waiting")]
    engine.wait_for(lambda e: e.active == 1)
    engine.block(release)
    assert all(isinstance(future.exception(30), EngineDeadError) for future in futures)
    release.set()


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


@pytest.mark.parametrize("overlap", [True, False])
def test_swap_under_load(overlap: bool) -> None:
    """The model is exchanged under a steady load of 32 threads, and no request fails."""
    old, new = (lambda: ScriptedEngine(lambda r: ["old"])), (lambda: ScriptedEngine(lambda r: ["new"]))
    swapped = threading.Event()

    def ask(_: int) -> set[str]:
        said = set()
        while not swapped.is_set():
            said.add(bridge.infer("which one?", timeout=30).text)
        said.add(bridge.infer("and now?").text)
        return said

    with Bridge(old) as bridge, ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(ask, number) for number in range(32)]
        while not bridge.requests():
            pass
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
        seat = bridge._host.server(True).seat
        assert seat is not None
        old = weakref.ref(seat.engine)
        del seat
        bridge.swap(ScriptedEngine)
        while old() is not None:
            bridge.infer("hello again")
            gc.collect()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_swap_changes_nothing(overlap: bool) -> None:
    """When the new model cannot be loaded, whoever asked is told and the old one serves on."""
    with Bridge(lambda: ScriptedEngine(lambda r: ["old"])) as bridge:
        with pytest.raises(EngineStartError, match="no weights"):
            bridge.swap(lambda: ScriptedEngine(start_error=OSError("no weights")), overlap=overlap)
        assert bridge.infer("who?").text == "old"
        assert bridge.state == "ready"


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
    bridge.close()


def test_a_killed_server_thread_holds_nobody(scripted: Scripted) -> None:
    """An exception thrown into the server thread ends every waiting and every later call, with the cause chained."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    futures = [bridge.submit(f"number {number}") for number in range(3)]
    stream = bridge.stream("a stream")
    engine.wait_for(lambda e: e.active == 4)
    server = bridge._host.server(True)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(server.thread_id or 0), ctypes.py_object(SystemExit))
    server.run_soon(lambda: None)  # it strikes at the thread's next bytecode
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, BridgeClosedError) for error in errors)
    assert isinstance(errors[0].__cause__, SystemExit) if errors[0] is not None else False
    with pytest.raises(BridgeClosedError):
        next(stream)
    with pytest.raises(BridgeClosedError, match="server thread"):
        bridge.infer("later")
    assert bridge.health().state == "failed"


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


def _stop_loop(bridge: Bridge) -> None:
    loop = bridge._host.server(True).loop
    loop.call_soon_threadsafe(loop.stop)


@pytest.mark.parametrize("end", [Bridge.close, _stop_loop])
def test_a_swap_ends_with_its_server_thread(end: Callable[[Bridge], None]) -> None:
    """Whoever waits for a swap is told when the bridge is closed, or its loop stopped, while the new model loads."""
    bridge, loading = Bridge(ScriptedEngine), ScriptedEngine(start_gate=threading.Event())
    bridge.start()
    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(bridge.swap, loading)
        while not loading.threads:
            bridge.stats()
        end(bridge)
        assert isinstance(swapping.exception(30), BridgeClosedError)
