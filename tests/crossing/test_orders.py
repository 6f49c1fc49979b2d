"""Orders reach every call that was made before them: in front of the gate, on its way, in the queue, at work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge import Bridge, BridgeClosedError, RequestAbortedError
from lmbridge.crossing.call import Call
from lmbridge.crossing.handle import ServerHandle
from lmbridge.testing import ScriptedEngine
from tests.conftest import until_living

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


@pytest.mark.parametrize("load", [0, 8])
def test_what_was_just_sent_is_reached(scripted: Scripted, load: int) -> None:
    """An abort or a close() that follows a submission at once ends it, also while others keep the server busy."""
    bridge, _ = scripted(ScriptedEngine(lambda request: ["word"] * 500, step_time=0.001))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            bridge.infer("load", max_new_tokens=5)

    with ThreadPoolExecutor(max(load, 1)) as pool:
        for _ in range(load):
            pool.submit(work)
        try:
            for number in range(300):
                stream = bridge.stream("to be aborted", request_id=f"number {number}")
                bridge.abort(stream.request_id)
                with pytest.raises(RequestAbortedError):
                    list(stream)
                client = bridge.client()
                stream = client.stream("to be closed")
                client.close()
                with pytest.raises(BridgeClosedError):
                    list(stream)
        finally:
            stop.set()


@pytest.mark.parametrize("moment", ["submit", "check_owner"])
def test_closing_a_client_reaches_a_call_on_its_way(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A thread may be held up anywhere between its question and the server; close() ends what it asks all the same."""
    bridge, engine = scripted()
    client = bridge.client("closing")
    original = getattr(ServerHandle, moment)

    def close_first(handle: ServerHandle, call: Call) -> None:
        if call.request.client == "closing":
            client.close()
            bridge.stats()  # the server has seen to it
        original(handle, call)

    monkeypatch.setattr(ServerHandle, moment, close_first)
    if moment == "check_owner":
        client.close()
    with pytest.raises(BridgeClosedError, match="closing"):
        client.infer("never answered", timeout=10)
    until_living(bridge, 0)
    assert engine.active == 0


def test_those_in_front_of_a_full_gate_are_reached(scripted: Scripted) -> None:
    """Calls that wait for room end with their client, or by their id, and never run."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    running, queued = bridge.submit("running"), None
    engine.wait_for(lambda e: e.active == 1)
    queued = bridge.submit("queued")
    client = bridge.client("outside")
    with ThreadPoolExecutor(3) as pool:
        closed = [pool.submit(client.infer, f"outside {number}") for number in range(2)]
        aborted = pool.submit(bridge.infer, "outside too", request_id="outside")
        until_living(bridge, 5)
        client.close()
        bridge.abort("outside")
        for future in closed:
            assert isinstance(future.exception(10), BridgeClosedError)
        assert isinstance(aborted.exception(10), RequestAbortedError)
    engine.step(1)
    engine.wait_for(lambda e: len(e.started) == 2)
    engine.step(1)
    assert (running.result(10).text, queued.result(10).text) == ("running", "queued")
    assert len(engine.started) == 2


def test_requests_shows_those_in_front_of_the_gate(scripted: Scripted) -> None:
    """Whoever asks what the bridge is busy with sees the callers that wait for room as well, and can abort them."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    futures = [bridge.submit("running")]
    engine.wait_for(lambda e: e.active == 1)
    futures.append(bridge.submit("queued"))
    with ThreadPoolExecutor(1) as pool:
        outside = pool.submit(bridge.infer, "outside")
        until_living(bridge, 3)
        assert [request.state for request in bridge.requests()] == ["running", "waiting", "waiting"]
        for request in bridge.requests():
            bridge.abort(request.id)
        for future in [*futures, outside]:
            assert isinstance(future.exception(10), RequestAbortedError)
    until_living(bridge, 0)


def test_what_is_left_before_it_is_sent_is_never_sent(scripted: Scripted) -> None:
    """A stream or group that is closed while its prompts still wait to be sent leaves nothing on the server's books."""
    bridge, engine = scripted()

    async def close_first() -> None:
        stream = bridge.astream("left before it was sent")
        await stream.aclose()
        bridge.stats()  # the server has seen to it
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    asyncio.run(close_first())
    group = bridge.stream_many(["one", "two"])
    group.close()
    bridge.stats()
    list(group)
    until_living(bridge, 0)
    assert len(engine.started) <= 2
    assert bridge.metrics.started == sum(bridge.metrics.outcomes.values())


def test_a_closed_client_sends_nothing_more(scripted: Scripted) -> None:
    """A list whose client is closed while it waits for room ends at once, whatever happens to the room."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    bridge.submit("queued")
    client = bridge.client()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.infer, ["a", "b", "c"], return_exceptions=True)
        until_living(bridge, 3)
        client.close()
        assert [type(end) for end in waiting.result(10)] == [BridgeClosedError] * 3
