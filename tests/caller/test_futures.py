"""Answers as concurrent.futures.Future."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable

import pytest

from lmbridge import Bridge, BridgeClosedError, ForkedError, RequestTimeoutError, Response
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_wait_and_as_completed(scripted: Scripted) -> None:
    """The standard library's tools work on them."""
    bridge, _ = scripted()
    futures: dict[concurrent.futures.Future[Response], int] = {bridge.submit(f"number {n}"): n for n in range(20)}
    for future in concurrent.futures.as_completed(futures, timeout=10):
        assert future.result().text == f"number {futures[future]}"
    done, pending = concurrent.futures.wait(futures, timeout=10)
    assert (len(done), len(pending)) == (20, 0)


def test_cancel_while_decoding(scripted: Scripted) -> None:
    """cancel() stops the engine and releases everybody who waits, also when the answer was half done."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    future = bridge.submit("a b c")
    engine.wait_for(lambda e: e.active == 1)
    engine.step(1)
    assert future.running()
    assert future.cancel()
    done, _ = concurrent.futures.wait([future], timeout=10)
    assert done == {future}
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    engine.wait_for(lambda e: e.active == 0)
    assert engine.aborted == [future.request_id]
    assert future.cancel()


def test_cancel_comes_too_late(scripted: Scripted) -> None:
    """cancel() of a finished future returns False and leaves its result."""
    bridge, _ = scripted()
    future = bridge.submit("done")
    assert future.result(10).text == "done"
    assert not future.cancel()
    assert future.result().text == "done"


def test_callbacks_may_call_the_bridge(scripted: Scripted) -> None:
    """A done-callback runs on neither the server thread nor a blocked one: it may ask the next question."""
    bridge, _ = scripted()
    answered = threading.Event()
    heard: list[Response] = []

    def ask_again(future: concurrent.futures.Future[Response]) -> None:
        heard.append(bridge.infer(future.result().text + " again"))
        answered.set()

    bridge.submit("first").add_done_callback(ask_again)
    assert answered.wait(10)
    assert heard[0].text == "first again"


def test_a_future_has_a_deadline_of_its_own(scripted: Scripted) -> None:
    """timeout= ends a future nobody waits on, even while the engine blocks the loop."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    release = threading.Event()
    engine.block(release)
    future = bridge.submit("hello", timeout=0.2)
    assert isinstance(future.exception(10), RequestTimeoutError)
    release.set()


def test_fire_and_forget(scripted: Scripted) -> None:
    """A future that nobody keeps still runs to its end."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    done = threading.Event()
    bridge.submit("a b").add_done_callback(lambda future: done.set())
    gc.collect()
    engine.wait_for(lambda e: e.active == 1)
    engine.step(2)
    assert done.wait(10)
    assert engine.aborted == []


def test_closing_the_bridge_ends_its_futures(scripted: Scripted) -> None:
    """No future stays pending after close(): each gets its own BridgeClosedError."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=2))
    futures = [bridge.submit(f"number {n}") for n in range(5)]
    engine.wait_for(lambda e: e.active == 2)
    bridge.close()
    errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, BridgeClosedError) for error in errors)
    assert len({id(error) for error in errors}) == 5


HOSTILE: dict[str, Callable[[concurrent.futures.Future[Response]], object]] = {
    "raises": lambda future: 1 / 0,
    "exits": lambda future: sys.exit(3),
    "interrupts": lambda future: _raise(KeyboardInterrupt()),
    "closes the future": lambda future: future.cancel(),
}


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("callback", HOSTILE)
def test_a_hostile_callback_harms_no_other_future(scripted: Scripted, callback: str) -> None:
    """Whatever a callback does, later futures are resolved, keep their own deadlines, and end with the bridge."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    first, later = bridge.submit("first"), bridge.submit("later two")
    first.add_done_callback(HOSTILE[callback])
    engine.wait_for(lambda e: e.active == 2)
    engine.step(1)
    assert first.result(10).text == "first"
    engine.step(1)
    assert later.result(10).text == "later two"
    expiring = bridge.submit("expiring", timeout=0.1)
    (done,) = concurrent.futures.wait([expiring], timeout=10).done
    assert isinstance(done.exception(), RequestTimeoutError)
    closing = bridge.submit("closing")
    bridge.close()
    assert isinstance(closing.exception(10), BridgeClosedError)


def test_a_callback_that_blocks_holds_up_no_future(scripted: Scripted) -> None:
    """A callback that waits for something keeps no other future from ending, nor its callback from being called."""
    bridge, _ = scripted()
    release, called = threading.Event(), threading.Event()
    bridge.submit("blocking").add_done_callback(lambda future: release.wait(30))
    later = bridge.submit("later")
    later.add_done_callback(lambda future: called.set())
    assert concurrent.futures.wait([later], timeout=10).not_done == set()
    assert called.wait(10)
    release.set()


def test_cancel_that_races_the_answer(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes while cancel() is half way harms neither thread, nor any later future."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    future = bridge.submit("racing")
    engine.wait_for(lambda e: e.active == 1)
    cancel = concurrent.futures.Future.cancel

    def answered_meanwhile(self: concurrent.futures.Future[Response]) -> bool:
        if self is future and threading.current_thread() is threading.main_thread():  # the dispatcher may come later
            engine.step(1)
            future._dispatcher.channel.nudge(future._call)
        return cancel(self)

    monkeypatch.setattr(concurrent.futures.Future, "cancel", answered_meanwhile)
    assert future.cancel()
    assert future.cancelled()
    later = bridge.submit("later")
    engine.wait_for(lambda e: e.active == 1)
    engine.step(1)
    assert later.result(10).text == "later"


def test_many_cancels_race_many_answers(scripted: Scripted) -> None:
    """Each future ends as cancelled or with its own answer, and no thread dies of the race."""
    bridge, _ = scripted()
    strikes: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, strikes.append
    try:
        for number in range(300):
            future = bridge.submit(f"number-{number}")
            if not future.cancel():
                assert future.result(10).text == f"number-{number}"
            assert concurrent.futures.wait([future], timeout=10).not_done == set()
    finally:
        threading.excepthook = before
    assert strikes == []
    assert bridge.submit("later").result(10).text == "later"


@pytest.mark.parametrize("name", ["lmbridge futures", "lmbridge callbacks"])
def test_a_helper_thread_that_is_struck_is_replaced(scripted: Scripted, name: str) -> None:
    """An exception thrown into the thread that resolves futures, or calls back, costs no future and no callback."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    before, threading.excepthook = threading.excepthook, lambda _: None
    called = threading.Semaphore(0)
    try:
        for number in range(5):
            future = bridge.submit(f"number-{number}")
            future.add_done_callback(lambda done: called.release())
            engine.wait_for(lambda e: e.active == 1)
            for thread in threading.enumerate():
                if thread.name == name:
                    ident = ctypes.c_ulong(thread.ident or 0)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
            engine.step(1)
            assert concurrent.futures.wait([future], timeout=20).not_done == set()
            assert called.acquire(timeout=20)
    finally:
        threading.excepthook = before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_inherited_by_a_forked_child(scripted: Scripted) -> None:
    """In a child, a future of the parent's is done with ForkedError: nothing waits for it, and cancel() says so."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    future = bridge.submit("the parent's")
    engine.wait_for(lambda e: e.active == 1)
    pid = os.fork()
    if pid == 0:
        said = 0
        try:
            done = concurrent.futures.wait([future], timeout=20).done
            said |= isinstance(next(iter(done)).exception(0), ForkedError)
        except ForkedError:
            said |= 1
        try:
            future.cancel()
        except ForkedError:
            said |= 2
        try:
            future.result(20)
        except ForkedError:
            said |= 4
        os._exit(said)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    engine.step(2)
    assert future.result(10).text == "the parent's"
