"""Answers as concurrent.futures.Future."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
from collections.abc import Callable

import pytest

from lmbridge import Bridge, BridgeClosedError, RequestTimeoutError, Response
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
