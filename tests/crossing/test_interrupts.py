"""Exceptions that strike between any two bytecodes: Ctrl-C, and what test runners and supervisors throw in."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lmbridge.caller.answer
import lmbridge.server.sweep
from lmbridge import Bridge, LMBridgeError, Response
from lmbridge.crossing.call import Call
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.handle import ServerHandle
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.crossing.striking import Thrown, ctrl_c, throw_into

SECONDS = 1.0
STRIDE = 7  # bytecodes between two strikes


def texts(results: list[Any]) -> list[str]:
    return [result.text if isinstance(result, Response) else repr(result) for result in results]


def group(bridge: Bridge, prompt: str) -> list[str]:
    with bridge.stream_many([prompt, f"{prompt} two"], timeout=60) as answers:
        for _ in answers:
            pass
        return texts(answers.responses)


def future(bridge: Bridge, prompt: str) -> list[str]:
    made = bridge.submit(prompt, timeout=60)
    made.add_done_callback(lambda done: None)
    return [made.result(60).text]


WAYS: dict[str, Callable[[Bridge, str], list[str]]] = {
    "infer": lambda bridge, prompt: [bridge.infer(prompt, timeout=60).text],
    "list": lambda bridge, prompt: texts(bridge.infer([prompt, f"{prompt} two"], timeout=60)),
    "stream": lambda bridge, prompt: ["".join(delta.text for delta in bridge.stream(prompt, timeout=60))],
    "stream_many": group,
    "submit": future,
}


def is_quiet(bridge: Bridge, engine: ScriptedEngine) -> bool:
    """Whether nothing is left of any call, each is counted, and the doorbell rings for the next."""
    metrics, handle = bridge.metrics, bridge._server_thread.handle
    counted = metrics.started == sum(metrics.outcomes.values())
    return counted and not bridge.requests() and handle.gate.empty and engine.active == 0 and not handle.bell.rung


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bell that was struck before it rang is found 20 times a second, rather than twice."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # finalizers are struck too
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.05)


@pytest.fixture
def quick_switches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Threads take turns as often as possible, so that every window is hit; a thread may end by what is thrown."""
    caplog.set_level(logging.CRITICAL, "lmbridge")  # each strike is told
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # it is thrown into finalizers too
    before, threads = sys.getswitchinterval(), set(threading.enumerate())
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    until(lambda: not any(thread.is_alive() for thread in threading.enumerate() if thread not in threads))


# --- Ctrl-C at one bytecode after another ---


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_at_any_bytecode_of_a_call(quick_looks: None, way: str) -> None:
    """Wherever Ctrl-C strikes a caller, others go on at once, futures still call back, and nothing is left of it."""
    engine = ScriptedEngine()
    with Bridge(engine, max_pending=4) as bridge:
        WAYS[way](bridge, "what happens once only")
        for number in itertools.count(1, STRIDE):
            where = ctrl_c(number, lambda: WAYS[way](bridge, "struck"))
            if where is None:
                break
            assert bridge.infer("somebody undisturbed", timeout=30).text == "somebody undisturbed", where
            called = threading.Event()
            bridge.submit("a future").add_done_callback(lambda done, called=called: called.set())  # type: ignore[misc]
            assert called.wait(30), where
            until(lambda: is_quiet(bridge, engine))
        assert number > 400
        until(lambda: bridge._access.dispatcher()._open == {})


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_at_a_full_gate(quick_looks: None, way: str) -> None:
    """Struck while others crowd in front of the gate, nobody of the crowd is refused, stuck or overtaken for ever."""
    engine = ScriptedEngine(max_batch_size=1)
    with Bridge(engine, max_pending=1) as bridge:
        WAYS[way](bridge, "what happens once only")
        crowd = [Caller(bridge, number, float("inf")) for number in range(3)]
        for caller in crowd:
            caller.start()
        for number in range(1, 3000, 2 * STRIDE):
            ctrl_c(number, lambda: WAYS[way](bridge, "struck"))
        so_far = {caller: caller.right for caller in crowd}
        until(lambda: all(caller.right > so_far[caller] + 10 for caller in crowd))
        for caller in crowd:
            caller.stop()
        assert [caller.errors for caller in crowd] == [[]] * 3
        until(lambda: is_quiet(bridge, engine))


@pytest.mark.parametrize("when", ["before it stands in line", "in line"])
def test_ctrl_c_twice_at_a_full_gate(quick_looks: None, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Who is struck again while he takes his call back leaves it to nobody: it must not keep its place for ever."""
    monkeypatch.setattr(lmbridge.server.sweep, "LOST_LOOKS", 4)
    stand, give_up = Gate.stand, lmbridge.caller.answer.give_up
    struck: list[str | None] = []

    def first_strike(gate: Gate, call: Call, wake: Callable[[], None]) -> bool:
        if when == "in line":
            assert not stand(gate, call, wake)
        raise KeyboardInterrupt

    def second_strike(server: ServerHandle, call: Call, error: BaseException) -> None:
        struck.append(ctrl_c(len(struck) * STRIDE + 1, lambda: give_up(server, call, error)))

    engine = ScriptedEngine(manual=True, max_batch_size=1)
    with Bridge(engine, max_pending=1) as bridge:
        others = [bridge.submit("running")]
        engine.wait_for(lambda e: e.active == 1)
        others.append(bridge.submit("queued"))
        with monkeypatch.context() as patch:
            patch.setattr(Gate, "stand", first_strike)
            patch.setattr(lmbridge.caller.answer, "give_up", second_strike)
            while not struck or struck[-1] is not None:
                with pytest.raises(KeyboardInterrupt):
                    bridge.infer("struck twice")
        assert len(struck) > 3
        for number, other in enumerate(others):
            engine.wait_for(lambda e, number=number: e.active == 1 and len(e.started) > number)  # type: ignore[misc]
            engine.step()
            assert other.result(30).text in ("running", "queued")
        until(lambda: is_quiet(bridge, engine))
        assert bridge.metrics.outcomes["RequestAbortedError"] == len(struck)


@pytest.mark.parametrize("way", ["start", "infer"])
def test_ctrl_c_at_any_bytecode_of_the_first_start(quick_looks: None, way: str) -> None:
    """Then there is one server or none: the next call is answered, and close() leaves neither thread nor engine."""
    before = set(threading.enumerate())
    for number in itertools.count(1, STRIDE):
        engines: list[ScriptedEngine] = []

        def build(engines: list[ScriptedEngine] = engines) -> ScriptedEngine:
            engines.append(ScriptedEngine())
            return engines[-1]

        bridge = Bridge(build)
        start = bridge.start if way == "start" else functools.partial(bridge.infer, "struck", timeout=60)
        where = ctrl_c(number, start)
        assert bridge.infer("and on", timeout=30).text == "and on", where
        bridge.close()
        assert len(engines) == 1, where
        assert engines[0].closed, where
        assert [t.name for t in threading.enumerate() if t not in before and t.name == "lmbridge server"] == []
        metrics = bridge.metrics
        assert metrics.started == sum(metrics.outcomes.values()), where
        if where is None:
            break
    assert number > 400


# --- at random moments ---


class Caller(threading.Thread):
    """Asks in every way until the time is up, whatever is thrown into it."""

    def __init__(self, bridge: Bridge, name: int, until: float) -> None:
        super().__init__(daemon=True)
        self.right = 0
        self.wrong: list[tuple[str, list[str]]] = []
        self.errors: list[BaseException] = []
        self._bridge = bridge
        self._until = until
        self._random = random.Random(name)
        self._number = name

    def stop(self) -> None:
        self._until = 0
        self.join(60)
        assert not self.is_alive()

    def run(self) -> None:
        while time.monotonic() < self._until:
            try:
                self._ask()
            except Thrown:
                continue
            except (LMBridgeError, RuntimeError) as error:  # the latter is how a lock says that it was lost
                self.errors.append(error)

    def _ask(self) -> None:
        prompt = f"caller {self._number} number {self._random.random()}"
        answers = WAYS[self._random.choice(list(WAYS))](self._bridge, prompt)
        if answers in ([prompt], [prompt, f"{prompt} two"]):
            self.right += 1
        else:
            self.wrong.append((prompt, answers))


@pytest.mark.parametrize(
    ("seed", "room", "seconds"),
    [
        (1, 16, SECONDS),
        (2, 1, SECONDS),
        (3, 2, SECONDS),
        *(pytest.param(seed, room, 30.0, marks=pytest.mark.long) for seed, room in ((4, 16), (5, 1), (6, 2))),
    ],
)
def test_interrupted_callers_strand_nobody(quick_switches: None, seed: int, room: int, seconds: float) -> None:
    """Thousands of exceptions at random moments: no wrong answer, no stuck thread, nothing left behind."""
    chance = random.Random(seed)
    engine = ScriptedEngine(max_batch_size=8)
    with Bridge(engine, max_pending=room) as bridge:
        future(bridge, "starts the threads that resolve futures")
        end = time.monotonic() + seconds
        callers = [Caller(bridge, seed * 100 + number, end) for number in range(16)]
        for caller in callers:
            caller.start()
        while time.monotonic() < end - 0.2:
            throw_into(chance.choice(callers).ident)
            bridge.infer("somebody undisturbed", timeout=30)
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
        assert sum(caller.right for caller in callers) > 100
        assert [wrong for caller in callers for wrong in caller.wrong] == []
        assert [error for caller in callers for error in caller.errors] == []
        until(lambda: is_quiet(bridge, engine))  # the sweep finds what was lost on the way
        del callers, caller
        gc.collect()
        assert bridge.infer("and on it goes").text == "and on it goes"


@pytest.mark.parametrize("name", ["lmbridge futures", "lmbridge callbacks"])
def test_what_strikes_the_threads_of_futures_costs_no_future(quick_switches: None, name: str) -> None:
    """Whatever is thrown into a thread of ours, it goes on or is replaced: every future ends, and calls back."""
    engine = ScriptedEngine()
    called: Counter[str] = Counter()
    struck = count = 0
    with Bridge(engine) as bridge:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            prompts = [f"{count} {number}" for number in range(4)]
            futures = [bridge.submit(prompt, timeout=60) for prompt in prompts]
            for prompt, made in zip(prompts, futures, strict=True):
                made.add_done_callback(lambda done, prompt=prompt: called.update([prompt]))  # type: ignore[misc]
            assert [made.result(60).text for made in futures] == prompts
            count += 1
            victims = [thread for thread in threading.enumerate() if thread.name == name]
            for thread in victims if count % 5 == 0 else []:
                if thread.is_alive():  # in one that is starting, it would strike Python itself
                    throw_into(thread.ident)
                    struck += 1
        assert struck > 20
        until(lambda: is_quiet(bridge, engine))
        lost = struck if name == "lmbridge callbacks" else 0  # at most the callback that was struck itself
        until(lambda: 4 * count - len(called) <= lost)
        assert max(called.values()) == 1


def test_janus_uses_what_was_made_safe() -> None:
    """The queues block on our conditions; a newer janus that does not would bring the stuck locks back."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        asking = threading.Thread(target=bridge.infer, args=("one",))
        asking.start()
        engine.wait_for(lambda e: e.active == 1)
        call = next(iter(bridge._server_thread.living()))
        condition: Any = call.channel.replies._sync_not_empty
        until(lambda: condition._waiters)
        engine.step()
        asking.join()
