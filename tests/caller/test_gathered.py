"""The future of a job or of a list of jobs."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lmbridge import Bridge, EngineError, InvalidRequestError, function_engine
from lmbridge.caller.gathered import Gathered
from lmbridge.caller.jobs import make_jobs
from lmbridge.caller.shapes import values
from lmbridge.messages import Apply
from tests.conftest import until


class Gate:
    """A function that lets its items through when it is told to, and fails with some."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[Any] = []

    def __call__(self, items: list[Any]) -> list[Any]:
        self.seen.extend(items)
        self.open.wait(60)
        return [ValueError("bad item") if item == "bad" else item for item in items]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def bridge(gate: Gate) -> Iterator[Bridge]:
    with Bridge(function_engine(gate, max_batch_size=4)) as bridge:
        yield bridge
        gate.open.set()


def gather(bridge: Bridge, items: list[Any]) -> Gathered[list[Any]]:
    account = bridge._account()
    return Gathered(account, Apply, make_jobs(account, Apply, items, Apply, {}, False), values, bridge)


def test_it_is_done_when_all_are(bridge: Bridge, gate: Gate) -> None:
    """result, callbacks, wait and as_completed hear of the end once, with everything in order."""
    future = gather(bridge, list(range(10)))
    heard: list[Any] = []
    called = threading.Event()
    future.add_done_callback(lambda done: (heard.append(done.result()), called.set()))  # type: ignore[func-returns-value]
    assert not future.done()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.01)
    gate.open.set()
    assert future.result(30) == list(range(10))
    assert concurrent.futures.wait([future], 30).done == {future}
    assert next(concurrent.futures.as_completed([future], 30)) is future
    assert called.wait(30)
    assert heard == [list(range(10))]
    assert not future.cancel()
    assert future.exception() is None


def test_an_empty_list_is_done_at_once(bridge: Bridge) -> None:
    """There is nothing to wait for, and nobody to say so."""
    assert gather(bridge, []).result(0) == []


def test_the_first_failure_ends_all(bridge: Bridge, gate: Gate) -> None:
    """What was asked for together is worth nothing in part: the others are aborted, and the error names its place."""
    future = gather(bridge, ["a", "bad", *range(100)])
    gate.open.set()
    with pytest.raises(EngineError, match="of the list: This item failed"):
        future.result(30)
    error = future.exception(30)
    assert isinstance(error, EngineError)
    assert error.index == 1
    assert not future.cancelled()
    until(lambda: not bridge.requests())
    assert concurrent.futures.wait([future], 30).done == {future}


def test_cancel_aborts_all(bridge: Bridge, gate: Gate) -> None:
    """Nothing goes on for somebody who has gone, and whoever waits is released."""
    future = gather(bridge, list(range(50)))
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(30)
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception(30)
    assert concurrent.futures.wait([future], 30).done == {future}
    gate.open.set()
    until(lambda: not bridge.requests())
    assert len(gate.seen) <= 8


def test_what_is_wrong_raises_at_once(bridge: Bridge, gate: Gate) -> None:
    """Nothing is left running of a list that could not be sent whole."""
    with pytest.raises(InvalidRequestError):
        bridge.submit_embed(["good", None])  # type: ignore[arg-type]
    assert bridge.requests() == []
    bridge.close()
    with pytest.raises(RuntimeError, match="closed"):
        bridge.submit_call(1)


def test_the_bridges_end_is_its_end(bridge: Bridge, gate: Gate) -> None:
    """close() leaves no future waiting."""
    future = gather(bridge, list(range(50)))
    gate.open.set()
    bridge.close(drain=True, timeout=30)
    assert future.result(30) == list(range(50))
