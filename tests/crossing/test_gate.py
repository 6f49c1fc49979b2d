"""The bounded gate: who waits there is counted once, is let in though a wake-up was lost, and holds up nobody."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from lmbridge import Bridge, BridgeClosedError, LMBridgeError, QueueFullError, RequestTimeoutError
from lmbridge.crossing.channel import Channel
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.messages import Request
from lmbridge.testing import ScriptedEngine, prompt_text
from tests.conftest import until_living

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def full(scripted: Scripted, **options: Any) -> tuple[Bridge, ScriptedEngine]:
    """A bridge with one request at work, one in the queue and no room for more."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1, **options)
    bridge.submit("running")
    engine.wait_for(lambda e: e.active == 1)
    bridge.submit("queued")
    return bridge, engine


WAYS: dict[str, Callable[[Bridge, float | None], object]] = {
    "infer": lambda bridge, timeout: bridge.infer("no room", timeout=timeout),
    "list": lambda bridge, timeout: bridge.infer(["no room", "neither"], timeout=timeout),
    "stream": lambda bridge, timeout: bridge.stream("no room", timeout=timeout),
    "submit": lambda bridge, timeout: bridge.submit("no room", timeout=timeout),
    "ainfer": lambda bridge, timeout: asyncio.run(bridge.ainfer("no room", timeout=timeout)),
    "alist": lambda bridge, timeout: asyncio.run(bridge.ainfer(["no room", "neither"], timeout=timeout)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_refusal_counts_once(scripted: Scripted, way: str) -> None:
    """Whoever watches ``QueueFullError`` sees as many as callers got, and each request that started ends once."""
    bridge, engine = full(scripted, when_full="reject")
    with pytest.raises(QueueFullError):
        WAYS[way](bridge, None)
    metrics = bridge.metrics
    assert Counter(metrics.outcomes) == Counter({"QueueFullError": 1})
    assert metrics.started == 3
    finish(engine, 2)
    assert Counter(metrics.outcomes) == Counter({"QueueFullError": 1, "stop": 2})


@pytest.mark.parametrize("way", WAYS)
def test_a_deadline_in_front_of_the_gate_counts_once(scripted: Scripted, way: str) -> None:
    """A caller who waited for room in vain is counted as one timeout, and what started is what ended."""
    bridge, engine = full(scripted)
    with pytest.raises(RequestTimeoutError, match="while the queue was full"):
        future = WAYS[way](bridge, 0.05)
        list(future) if way == "stream" else None  # type: ignore[call-overload]
    finish(engine, 2)
    metrics = bridge.metrics
    assert metrics.outcomes["stop"] == 2
    assert sum(metrics.outcomes.values()) == metrics.started
    assert metrics.outcomes["RequestTimeoutError"] == metrics.started - 2 >= 1


def is_at(number: int, engine: ScriptedEngine) -> bool:
    """Whether the engine works on its ``number``-th request."""
    return len(engine.started) >= number and engine.active == 1


def finish(engine: ScriptedEngine, count: int) -> None:
    """Let so many one-word requests be answered one after another."""
    for number in range(count):
        engine.wait_for(partial(is_at, number + 1))
        engine.step(1)


@pytest.mark.parametrize("lost", ["nudge", "signal"])
def test_a_lost_wake_up_costs_no_caller(scripted: Scripted, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Exceptions may strike whoever wakes somebody just before it does; who waits looks by himself."""
    bridge, engine = full(scripted)
    monkeypatch.setattr(Channel, lost, lambda channel, call: None)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(bridge.infer, f"waiting-{number}") for number in range(2)]
        until_living(bridge, 4)
        finish(engine, 4)
        assert {future.result(20).text for future in waiting} == {"waiting-0", "waiting-1"}


def test_a_link_lost_from_the_chain_of_wakes_costs_no_caller(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that was struck between taking its successor off and waking it leaves nobody asleep."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    lost: list[threading.Lock] = []

    def pass_on(chain: WakeChain) -> None:
        if chain._waiting:
            lost.append(chain._waiting.popleft())

    monkeypatch.setattr(WakeChain, "pass_on", pass_on)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bridge.infer, f"number {number}") for number in range(4)]
        engine.wait_for(lambda e: e.active == 4)
        engine.step(2)
        assert [future.result(20).text for future in waiting] == [f"number {number}" for number in range(4)]
    assert lost


def test_clients_take_turns_in_front_of_the_gate(scripted: Scripted) -> None:
    """One client with very many prompts in front of the gate does not keep another's first one waiting behind them."""
    begun: list[str] = []

    def reply(request: Request) -> list[str]:
        begun.append(prompt_text(request.prompt))
        return ["done"]

    own = ScriptedEngine(reply, manual=True, max_batch_size=1)
    bridge, engine = scripted(own, max_pending=2, max_pending_per_client=2)
    crowd, other = bridge.client("crowd"), bridge.client("alone")
    with ThreadPoolExecutor(21) as pool:
        asked = [pool.submit(crowd.infer, "crowd") for _ in range(20)]
        until_living(bridge, 20)
        asked.append(pool.submit(other.infer, "alone"))
        until_living(bridge, 21)
        while any(not future.done() for future in asked):
            engine.wait_for(lambda e: e.active == 1 or not bridge.requests())
            engine.step(1)
    assert begun.index("alone") < 6


def test_a_list_flows_through_a_bridge_that_rejects(scripted: Scripted) -> None:
    """A list is one call: once its first prompt has a place, the others wait for room rather than being refused."""
    bridge, _ = scripted(max_pending=2, max_pending_per_client=2, when_full="reject")
    prompts = [f"number {number}" for number in range(50)]
    assert [answer.text for answer in bridge.infer(prompts)] == prompts
    assert [answer.text for answer in asyncio.run(bridge.ainfer(prompts))] == prompts
    with bridge.stream_many(prompts) as group:
        for _ in group:
            pass
        assert [getattr(end, "text", end) for end in group.responses] == prompts
    assert bridge.metrics.outcomes["QueueFullError"] == 0


def test_prompts_that_were_not_sent_end_with_the_bridge(scripted: Scripted) -> None:
    """Each answer of a group ends with a delta of its own when the bridge is closed, those still to be sent too."""
    bridge, engine = scripted(ScriptedEngine(manual=True, max_batch_size=1), max_pending=1)
    group = bridge.stream_many([f"number-{number}" for number in range(6)])
    engine.wait_for(lambda e: e.active == 1)
    bridge.close()
    ends = {index: delta.error for index, delta in group}
    assert sorted(ends) == list(range(6))
    assert all(isinstance(error, BridgeClosedError) for error in ends.values())
    assert all(isinstance(end, BridgeClosedError) for end in group.responses)


def test_a_list_past_its_deadline_is_counted_whole(scripted: Scripted) -> None:
    """Each prompt of a list whose time is up before it could be sent is a request that started and timed out."""
    bridge, _ = scripted(ScriptedEngine(manual=True), max_pending=2)
    bridge.start()
    answers = bridge.infer(["late"] * 20, timeout=0, return_exceptions=True)
    assert {type(answer).__name__ for answer in answers} == {"RequestTimeoutError"}
    until_living(bridge, 0)
    assert bridge.metrics.started == bridge.metrics.outcomes["RequestTimeoutError"] == 20


def test_what_strikes_a_caller_at_the_full_gate_strikes_nobody_else(scripted: Scripted) -> None:
    """An exception thrown into a caller who waits for room leaves the gate to the others, at once."""
    import ctypes

    bridge, engine = full(scripted)
    struck: list[BaseException] = []

    def ask() -> None:
        try:
            bridge.infer("interrupted")
        except KeyboardInterrupt as error:
            struck.append(error)

    victim = threading.Thread(target=ask)
    victim.start()
    until_living(bridge, 3)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident or 0), ctypes.py_object(KeyboardInterrupt))
    victim.join(10)
    assert len(struck) == 1
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(bridge.infer, "later", timeout=20)
        until_living(bridge, 3)
        finish(engine, 3)
        assert later.result(20).text == "later"
    metrics = bridge.metrics
    assert metrics.started == sum(metrics.outcomes.values())


def test_counts_add_up_after_everything(scripted: Scripted) -> None:
    """Answers, refusals, timeouts, aborts, left streams and cancelled futures: each that started is counted once."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.001, max_batch_size=2), max_pending=4, when_full="reject")
    made: Counter[str] = Counter()

    def ask(number: int) -> None:
        try:
            if number % 4 == 0:
                bridge.infer("a b c")
            elif number % 4 == 1:
                bridge.infer("a b c", timeout=0.001)
            elif number % 4 == 2:
                stream = bridge.stream("a b c")
                next(stream)
                stream.close()
            else:
                bridge.submit("a b c").cancel()
        except LMBridgeError as error:
            made[type(error).__name__] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(400)))
    bridge.close()
    metrics = bridge.metrics
    assert metrics.started == sum(metrics.outcomes.values()) == 400
    assert metrics.outcomes["QueueFullError"] == made["QueueFullError"]
