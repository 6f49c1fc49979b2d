"""Engines that stall, block or are exchanged, while callers go on."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import lmbridge.server.thread
from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineDeadError,
    EngineStartError,
    InvalidRequestError,
    RequestTimeoutError,
)
from lmbridge.engines.standing import where_is
from lmbridge.server.loop import ServerLoop
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


class Threaded(ScriptedEngine):
    """An engine that makes no step by itself, and whose work is done by a thread of its own, which waits."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.release = threading.Event()
        self.worker = threading.Thread(target=self._wait_in_a_kernel, daemon=True)
        self.worker.start()

    def _wait_in_a_kernel(self) -> None:
        self.release.wait(60)

    def where(self) -> str:
        return f"its thread stands in {where_is(self.worker.ident)}"

    async def close(self) -> None:
        self.release.set()
        await super().close()


def test_a_stall_tells_where_the_thread_stands() -> None:
    """Whoever reads that an engine made no progress would not know which code to look at."""
    with Bridge(Threaded(), stall_timeout=0.3) as bridge:
        error = bridge.submit("never stepped").exception(20)
        assert isinstance(error, EngineDeadError)
        text = str(error.__cause__)
        assert text.startswith("no progress for 0.3 s (stall_timeout); its thread stands in ")
        assert "server/test_repair.py:" in text
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


def test_an_idle_engine_is_not_stalled() -> None:
    """An engine without work may be silent for as long as it likes."""
    workshop = Workshop()
    with Bridge(workshop, stall_timeout=0.1) as bridge:
        watching = threading.Event()
        sweep = server_loop(bridge).sweep
        for _ in range(3):  # three of its sweeps are many of the watchdog's looks
            before = sweep.heartbeat
            while sweep.heartbeat == before:
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
        place = server_loop(bridge).calls.place
        assert place is not None
        old = weakref.ref(place.engine)
        del place
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


def test_an_engine_that_dies_during_a_swap_that_fails() -> None:
    """The old engine, dead meanwhile, would be kept: no engine any more, and callers who wait for ever."""
    gate, engines = threading.Event(), list[ScriptedEngine]()

    def factory() -> ScriptedEngine:
        engines.append(ScriptedEngine())
        return engines[-1]

    broken = ScriptedEngine(start_gate=gate, start_error=OSError("no weights"))
    with Bridge(factory) as bridge, ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(bridge.swap, lambda: broken)
        while not broken.threads:
            bridge.stats()
        engines[0].crash(ValueError("device lost"))
        until(bridge, "restarting")
        gate.set()
        assert isinstance(swapping.exception(30), EngineStartError)
        assert bridge.infer("and on", timeout=30).text == "and on"
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
    assert bridge.health().state == "failed"


# --- what health says ---


def until(bridge: Bridge, state: str) -> None:
    """Return when the bridge is in that state; the test's own timeout is the limit."""
    while bridge.state != state:
        pass


def test_health_while_the_loop_is_stuck(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer would send more requests to a server thread that serves none of them."""
    monkeypatch.setattr(lmbridge.server.thread, "LOOP_GRACE", 1.0)
    bridge, engine = scripted(stall_timeout=None)
    release = threading.Event()
    bridge.infer("hello")
    engine.block(release)
    until(bridge, "restarting")
    health = bridge.health()
    assert "the server thread has not answered for" in health.reason
    assert "_wait_here" in health.reason
    assert health.silent > 1.0
    release.set()
    until(bridge, "ready")
    assert bridge.health().reason == ""


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
    until(bridge, "failed")


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
    monkeypatch.setattr(host, "_note_end", lambda cause: None)
    _stop_loop(bridge)
    assert host._thread is not None
    host._thread.join(30)
    health = bridge.health()
    assert (health.state, health.reason) == ("failed", "the server thread has ended")


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
    monkeypatch.setattr(lmbridge.server.thread, "QUIET", 0.2)
    engine = Threaded()
    with Bridge(engine) as bridge:
        future = bridge.submit("one two")
        while not (reason := bridge.health().reason):
            pass
        assert bridge.state == "ready"
        assert reason.startswith("the engine has made no progress for ")
        assert "_wait_in_a_kernel" in reason
        engine.step(2)
        assert future.result(10).text == "one two"
        while bridge.health().reason:
            pass


def test_a_deadline_gives_advice_that_helps(scripted: Scripted) -> None:
    """A caller who got not one token would be told to ask for fewer of them."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1))
    bridge.start()
    silent, waiting = bridge.submit("one two three", timeout=1.0), bridge.submit("queued", timeout=0.5)
    assert "health() says what holds the queue up" in str(waiting.exception(10))
    assert "No token had come: see in health()" in str(silent.exception(10))
    stream = bridge.stream("one two three", timeout=2.0)
    engine.wait_for(lambda e: e.active == 1)
    engine.step()
    assert next(stream).text == "one"
    with pytest.raises(RequestTimeoutError, match="fewer max_new_tokens"):
        list(stream)


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


def server_loop(bridge: Bridge) -> ServerLoop:
    """What runs on the server thread."""
    loop = bridge._server_thread._loop
    assert loop is not None
    return loop


def _stop_loop(bridge: Bridge) -> None:
    loop = server_loop(bridge).loop
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
