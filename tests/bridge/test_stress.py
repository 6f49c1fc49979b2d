"""A crowd on an engine that delays, refuses, fails, stalls and dies at random; nobody is mixed up, hung or leaked.

Run with other seeds or more requests by ``STRESS_SEEDS=1,2,3 STRESS_REQUESTS=20000 python -m pytest -s`` on this file.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import ClassVar

import pytest

import lmbridge.server.supervisor
from lmbridge import Bridge, EngineDeadError, EngineError, Request, RequestTimeoutError
from lmbridge.engines.base import Sink
from lmbridge.testing import ScriptedEngine, prompt_text
from tests.conftest import until

SEEDS = [int(seed) for seed in os.environ.get("STRESS_SEEDS", "1").split(",")]
REQUESTS = int(os.environ.get("STRESS_REQUESTS", "20000"))
THREADS = 64


class ChaosEngine(ScriptedEngine):
    """A scripted engine with a will of its own."""

    faults: ClassVar[Counter[str]] = Counter()

    def __init__(self, chance: random.Random) -> None:
        super().__init__(max_batch_size=16)
        self._chance = chance
        self._stalled = False

    def add_request(self, request: Request, sink: Sink) -> None:
        roll = self._chance.random()
        if roll < 0.01:
            self.faults["refused"] += 1
            raise EngineError("refused by chance")
        if roll < 0.02:
            self.faults["failed"] += 1
            self.fail(prompt_text(request.prompt), ValueError("failed by chance"))
        super().add_request(request, sink)
        if roll > 0.999:
            self.faults["died"] += 1
            self.on_death(ValueError("died by chance"))
        elif roll > 0.9985:
            self.faults["stalled"] += 1
            self._stalled = True

    def _step(self) -> None:
        if not self._stalled:
            super()._step()


class Caller(threading.Thread):
    """Asks its share of the questions, each with a token of its own in it, in all ways."""

    def __init__(self, bridge: Bridge, number: int, count: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.ends: Counter[str] = Counter()
        self._bridge = bridge
        self._number = number
        self._count = count
        self._chance = random.Random(seed * 1000 + number)

    def run(self) -> None:
        for question in range(self._count):
            text = f"thread {self._number} question {question}" + " and on" * self._chance.randrange(4)
            try:
                self._ask(text, self._chance.randrange(6))
            except EngineDeadError as error:
                self.ends["died" if error.retryable else "down"] += 1
            except (EngineError, RequestTimeoutError, CancelledError) as error:
                self.ends[type(error).__name__] += 1

    def _ask(self, text: str, way: int) -> None:
        if way == 0:
            answer = self._bridge.submit(text, timeout=60).result(60).text
        elif way == 1:
            answer = "".join(delta.text for delta in self._bridge.stream(text, timeout=60))
        elif way == 2:
            for _ in self._bridge.stream(text, timeout=60):
                break
            self.ends["left"] += 1
            return
        elif way == 3:
            future = self._bridge.submit(text)
            future.cancel()
            answer = future.result(60).text
        else:
            answer = self._bridge.infer(text, timeout=60).text
        self.ends["right" if answer == text else "mixed"] += 1


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that take turns at every bytecode, and an engine that may die as often as it likes."""
    monkeypatch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", 10**9)
    monkeypatch.setattr(lmbridge.server.supervisor, "FIRST_BACKOFF", 0.0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.timeout(300)
@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_storm(storm: None, seed: int) -> None:
    """64 threads: every request ends once, with its own answer or the error of what happened to it."""
    chance = random.Random(seed)
    ChaosEngine.faults = Counter()
    with Bridge(lambda: ChaosEngine(chance), max_pending=48, stall_timeout=0.3) as bridge:
        callers = [Caller(bridge, number, REQUESTS // THREADS, seed) for number in range(THREADS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(240)
        hung = sum(caller.is_alive() for caller in callers)
        ends = sum((caller.ends for caller in callers), Counter[str]())
        until(lambda: not bridge.requests() and bridge._server_thread.handle.gate.pending == 0)
        print(f"seed {seed}: {REQUESTS} requests, faults {dict(ChaosEngine.faults)}, ends {dict(ends)}, hung {hung}")
        assert hung == 0
        assert ends["mixed"] == 0
        assert sum(ends.values()) == THREADS * (REQUESTS // THREADS)
        assert ends["right"] > REQUESTS / 3
        assert set(ends) <= {"right", "left", "died", "EngineError", "CancelledError"}
        assert min(ChaosEngine.faults.values()) > 0
