"""Callers on an event loop of their own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from lmbridge.testing import ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_many_tasks_on_many_loops(scripted: Scripted) -> None:
    """Tasks of several event loops share the bridge, and each gets its own answer."""
    bridge, _ = scripted(ScriptedEngine(max_batch_size=8))

    async def ask_all(loop: int) -> list[bool]:
        prompts = [f"loop {loop} task {task}" for task in range(50)]
        answers = await asyncio.gather(*(bridge.ainfer(prompt) for prompt in prompts))
        return [answer.text == prompt for answer, prompt in zip(answers, prompts, strict=True)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda loop: asyncio.run(ask_all(loop)), range(4)))
    assert all(all(rights) for rights in results)


def test_astream(scripted: Scripted) -> None:
    """Deltas arrive on the caller's loop and join to the answer."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.001))

    async def read() -> tuple[str, str]:
        stream = bridge.astream("once upon a time")
        text = "".join([delta.text async for delta in stream])
        return text, stream.response.text

    assert asyncio.run(read()) == ("once upon a time", "once upon a time")


def test_astream_sent_before_it_is_read(scripted: Scripted) -> None:
    """Awaiting the stream sends it, so that generation may begin before the first delta is asked for."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()

    async def read() -> list[str]:
        stream = await bridge.astream("a b")
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 1)
        await asyncio.to_thread(engine.step, 2)
        return [delta.text async for delta in stream]

    assert asyncio.run(read()) == ["a b"]


def test_astream_without_room(scripted: Scripted) -> None:
    """A full queue that rejects is told by the stream, and a wrong prompt by the call itself."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1, when_full="reject")
    futures = [bridge.submit("running")]
    engine.wait_for(lambda e: e.active == 1)
    futures.append(bridge.submit("waiting"))

    async def read() -> None:
        with pytest.raises(InvalidRequestError):
            bridge.astream("")
        with pytest.raises(QueueFullError):
            async for _ in bridge.astream("no room"):
                pass

    asyncio.run(read())
    for future in futures:
        future.cancel()


def test_a_list(scripted: Scripted) -> None:
    """ainfer takes a list like infer; the first error carries its position and aborts the rest."""
    bridge, engine = scripted()
    engine.fail("bad", ValueError("broken"))
    assert [r.text for r in asyncio.run(bridge.ainfer(["a", "b"]))] == ["a", "b"]
    with pytest.raises(EngineError) as caught:
        asyncio.run(bridge.ainfer(["good one here", "bad"]))
    assert caught.value.index == 1
    results = asyncio.run(bridge.ainfer(["good", "x"], return_exceptions=True))
    assert len(results) == 2


def test_cancelling_the_task_aborts(scripted: Scripted) -> None:
    """A cancelled task does not leave its request running on the engine."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()

    async def cancel_one() -> None:
        task = asyncio.ensure_future(bridge.ainfer("a b c"))
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 0)

    asyncio.run(cancel_one())
    assert len(engine.aborted) == 1


def test_break_aborts_while_the_stream_is_held(scripted: Scripted) -> None:
    """Leaving `async for` stops the engine, even while the stream object is still held."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()

    async def leave() -> str:
        stream = await bridge.astream("a b c")
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 1)
        await asyncio.to_thread(engine.step, 1)
        async for _ in stream:
            break
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 0)
        return stream.response.finish_reason

    assert asyncio.run(leave()) == "abort"


def test_a_deadline(scripted: Scripted) -> None:
    """timeout= works for tasks, and the error carries the partial text."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()

    async def late() -> None:
        task = asyncio.ensure_future(bridge.ainfer("a b c", timeout=0.5))
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 1)
        await asyncio.to_thread(engine.step, 1)
        await task

    with pytest.raises(RequestTimeoutError) as caught:
        asyncio.run(late())
    assert caught.value.partial == "a"


def test_a_full_queue_does_not_block_the_loop(scripted: Scripted) -> None:
    """While one task waits for room in the queue, the caller's loop goes on serving other tasks."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    bridge.start()

    async def crowd() -> list[str]:
        tasks = [asyncio.ensure_future(bridge.ainfer(f"task {n}")) for n in range(4)]
        for number in range(4):
            await asyncio.to_thread(engine.wait_for, partial(_started, number + 1))
            await asyncio.to_thread(engine.step, 2)
        return [answer.text for answer in await asyncio.gather(*tasks)]

    assert asyncio.run(crowd()) == [f"task {n}" for n in range(4)]


def test_closing_the_bridge_ends_waiting_tasks(scripted: Scripted) -> None:
    """A task that waits for an answer ends with BridgeClosedError when the bridge is closed."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()

    async def wait_for_ever() -> None:
        task = asyncio.ensure_future(bridge.ainfer("a b c"))
        await asyncio.to_thread(engine.wait_for, lambda e: e.active == 1)
        await asyncio.to_thread(bridge.close)
        await task

    with pytest.raises(BridgeClosedError):
        asyncio.run(wait_for_ever())


def test_a_sync_call_inside_a_running_loop(scripted: Scripted) -> None:
    """A notebook cell, whose thread has a running loop, may call infer."""
    bridge, _ = scripted()

    async def cell() -> str:
        return bridge.infer("from a notebook").text

    assert asyncio.run(cell()) == "from a notebook"


def test_closed_loops_are_not_kept(scripted: Scripted) -> None:
    """A program that makes a loop per task does not pile up loops in the bridge."""
    bridge, _ = scripted()
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def ask() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await bridge.ainfer("hello")

    for _ in range(5):
        thread = threading.Thread(target=lambda: asyncio.run(ask()))
        thread.start()
        thread.join()
    asyncio.run(ask())  # whoever comes next clears away what is closed
    while any(loop() is not None for loop in loops[:5]):  # the server notices within its next looks around
        bridge.infer("still here")
        gc.collect()


def _started(count: int, engine: ScriptedEngine) -> bool:
    return len(engine.started) == count
