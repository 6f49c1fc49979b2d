"""Exceptions thrown into callers between any two bytecodes: Ctrl-C, and what test runners and supervisors inject."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lmbridge import Bridge, LMBridgeError
from lmbridge.testing import ScriptedEngine

SECONDS = 5.0


class Thrown(BaseException):
    """What is thrown in."""


@pytest.fixture
def quick_switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads take turns as often as possible, so that every window is hit; a thread may end by what is thrown."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # it is thrown into finalizers too
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Caller(threading.Thread):
    """Asks in every way until the time is up, whatever is thrown into it."""

    def __init__(self, bridge: Bridge, name: int, until: float) -> None:
        super().__init__(daemon=True)
        self.right = self.mixed = 0
        self.errors: list[LMBridgeError] = []
        self._bridge = bridge
        self._until = until
        self._random = random.Random(name)
        self._name = name

    def run(self) -> None:
        while time.monotonic() < self._until:
            try:
                self._ask()
            except Thrown:
                continue
            except LMBridgeError as error:
                self.errors.append(error)

    def _ask(self) -> None:
        prompt = f"caller {self._name} number {self._random.random()}"
        kind = self._random.randrange(3)
        if kind == 0:
            same = self._bridge.infer(prompt, timeout=30).text == prompt
        elif kind == 1:
            same = "".join(delta.text for delta in self._bridge.stream(prompt, timeout=30)) == prompt
        else:
            answers = self._bridge.infer([prompt, prompt + " two"], timeout=30)
            same = [answer.text for answer in answers] == [prompt, prompt + " two"]
        self.right += same
        self.mixed += not same


@pytest.mark.parametrize("seed", [1, 2])
def test_interrupted_callers_strand_nobody(quick_switches: None, seed: int) -> None:
    """Thousands of exceptions at random moments: no wrong answer, no stuck thread, nothing left behind."""
    chance = random.Random(seed)
    engine = ScriptedEngine(max_batch_size=8)
    with Bridge(engine, max_pending=16) as bridge:
        until = time.monotonic() + SECONDS
        callers = [Caller(bridge, seed * 100 + number, until) for number in range(16)]
        for caller in callers:
            caller.start()
        while time.monotonic() < until - 0.5:
            victim = chance.choice(callers)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident or 0), ctypes.py_object(Thrown))
            bridge.infer("somebody undisturbed", timeout=30)
        for caller in callers:
            caller.join(30)
            assert not caller.is_alive()
        assert sum(caller.right for caller in callers) > 100
        assert sum(caller.mixed for caller in callers) == 0
        assert [error for caller in callers for error in caller.errors] == []
        gate = bridge._server_thread.handle.gate
        while bridge.requests() or gate.pending or engine.active:  # the sweep finds what was lost on the way
            bridge.stats()
        del callers, caller
        gc.collect()
        assert bridge.infer("and on it goes").text == "and on it goes"


def test_janus_uses_what_was_made_safe() -> None:
    """The queues block on our conditions; a newer janus that does not would bring the stuck locks back."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        asking = threading.Thread(target=bridge.infer, args=("one",))
        asking.start()
        engine.wait_for(lambda e: e.active == 1)
        call = next(iter(bridge._server_thread.living()))
        condition: Any = call.channel.replies._sync_not_empty
        while not condition._waiters:
            assert asking.is_alive()
        engine.step()
        asking.join()
