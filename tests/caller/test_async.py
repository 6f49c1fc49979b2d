"""Callers on an event loop of their own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from lmbridge import (
    AsyncStream,
    Bridge,
    BridgeClosedError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from lmbridge.crossing.channel import Channel
from lmbridge.testing import ScriptedEngine
from tests.conftest import until, until_then

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


def test_two_tasks_wait_for_one_whole_answer(scripted: Scripted) -> None:
    """Both get it; neither is left waiting because the other was told."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.01))

    async def both() -> list[str]:
        stream = await bridge.astream("one answer for two")
        answers = await asyncio.wait_for(asyncio.gather(stream.whole(), stream.whole()), 10)
        return [answer.text for answer in answers]

    assert asyncio.run(both()) == ["one answer for two"] * 2


def test_a_stream_read_on_one_loop_after_another(scripted: Scripted) -> None:
    """Synchronous code that runs each step on a loop of its own reads on where the last one stopped."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.01))

    async def begin() -> AsyncStream:
        return await bridge.astream("a b c d e")

    async def piece(stream: AsyncStream) -> str:
        return (await asyncio.wait_for(stream.__anext__(), 10)).text

    stream = asyncio.run(begin())
    heard = ""
    while heard != "a b c d e":
        heard += asyncio.run(piece(stream))
    with pytest.raises(StopAsyncIteration):
        asyncio.run(piece(stream))
    assert stream.response.text == "a b c d e"


def test_an_unsent_stream_is_sent_by_the_loop_that_reads_it(scripted: Scripted) -> None:
    """A stream may be made on one loop and first read on another."""
    bridge, _ = scripted()

    async def make() -> AsyncStream:
        return bridge.astream("made elsewhere")

    async def whole(stream: AsyncStream) -> str:
        return (await asyncio.wait_for(stream.whole(), 10)).text

    assert asyncio.run(whole(asyncio.run(make()))) == "made elsewhere"


def test_tasks_are_accounts_as_threads_are(scripted: Scripted) -> None:
    """Each task takes turns of its own, so that one that asks much does not hold up the others of its loop."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending_per_client=2)

    async def ask() -> list[str]:
        greedy = asyncio.ensure_future(bridge.ainfer([f"greedy-{number}" for number in range(10)]))
        other = asyncio.ensure_future(bridge.ainfer("other"))
        stepping = asyncio.get_running_loop().run_in_executor(None, step_until_done, bridge, engine)
        await other
        done = list(engine.started)
        await asyncio.gather(greedy, stepping)
        return done

    started = asyncio.run(asyncio.wait_for(ask(), 30))
    assert len(started) <= 5


def is_at(number: int, engine: ScriptedEngine) -> bool:
    """Whether the engine works on its ``number``-th request."""
    return len(engine.started) >= number and engine.active == 1


def step_until_done(bridge: Bridge, engine: ScriptedEngine) -> None:
    """Answer requests of one word each, one after another, until eleven are through."""
    for number in range(11):
        engine.wait_for(partial(is_at, number + 1))
        engine.step(1)


def test_a_token_that_is_lost_costs_no_task(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever wakes a task may be struck just before it does; the loop looks by itself."""
    bridge, _ = scripted()
    monkeypatch.setattr(Channel, "signal", lambda channel, call: None)

    async def ask() -> list[str]:
        one, many = bridge.ainfer("one"), bridge.ainfer(["two", "three"])
        answer, answers = await asyncio.wait_for(asyncio.gather(one, many), 20)
        return [answer.text, *(each.text for each in answers)]

    assert asyncio.run(ask()) == ["one", "two", "three"]


def test_a_loop_that_is_closed_with_calls_inside(scripted: Scripted) -> None:
    """What was asked there would run on, and stay in the books, though nobody can ever read it."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    loop = asyncio.new_event_loop()
    asked: list[Any] = []

    async def ask() -> None:
        asked.append(asyncio.ensure_future(bridge.ainfer("a b c")))
        asked.append(asyncio.ensure_future(bridge.ainfer(["d e", "f g"])))
        await until_then(lambda: engine.active == 3)

    loop.run_until_complete(ask())
    loop.close()
    until(lambda: bridge.requests() == [] and engine.active == 0)
    assert bridge.metrics.started == sum(bridge.metrics.outcomes.values()) == 3
    for task in asked:
        task._log_destroy_pending = False
