"""Any order of asking in every way, reading, leaving, aborting, closing clients, refusing, failing and crashing."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

import lmbridge.server.supervisor
from lmbridge import (
    Bridge,
    BridgeClosedError,
    Client,
    EngineDeadError,
    EngineError,
    RequestAbortedError,
)
from lmbridge.testing import ScriptedEngine
from tests.bridge.asked import LISTS, PATIENCE, TASK_WAYS, WAYS
from tests.bridge.machine import REFUSED, Machine, lengths
from tests.conftest import until

CLIENTS = ("a", "b")
PICK = st.integers(0, 7)
ASKERS = st.sampled_from([None, "a", *CLIENTS])  # None: the bridge itself


class CallsMachine(Machine):
    """One engine at a time, which makes a step when it is told to; a small queue."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[str, Client] = {}
        self.release: threading.Event | None = None  # there while the loop is stuck

    def build(self) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(manual=True, max_batch_size=2))
        return self.engines[-1]

    @initialize(when_full=st.sampled_from(["block", "reject"]), crowd=st.booleans())
    def begin(self, when_full: Any, crowd: bool) -> None:
        self.patch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", 10_000)
        self.when_full = when_full
        self.open_bridge()
        for _ in range(5 if crowd else 0):  # the gate is full to begin with
            self.ask("infer", self.bridge, 3, None, REFUSED[self.when_full])

    def open_bridge(self) -> None:
        self.age = 0
        self.bridge = Bridge(
            self.build, max_pending=2, max_pending_per_client=2, when_full=self.when_full, stall_timeout=None
        ).start()
        self.clients = {name: self.bridge.client(name) for name in CLIENTS}

    # --- asking ---

    def asker(self, name: str | None) -> Bridge | Client:
        return self.bridge if name is None else self.clients[name]

    @rule(
        way=st.sampled_from([*WAYS, *TASK_WAYS]),
        name=ASKERS,
        words=st.integers(0, 3),
        timeout=st.sampled_from([None, None, 60.0, 0.02, 0]),
        times=st.sampled_from([1, 1, 5]),
    )
    def asks(self, way: str, name: str | None, words: int, timeout: float | None, times: int) -> None:
        """Alone, or in a crowd that the gate has no room for."""
        for _ in range(times):
            self.ask(way, self.asker(name), words, timeout, REFUSED[self.when_full]).asker = name

    @rule(way=st.sampled_from(sorted(set(WAYS) - set(LISTS))), name=ASKERS, timeout=st.sampled_from([None, 60.0]))
    def asks_and_is_held_up(self, way: str, name: str | None, timeout: float | None) -> None:
        """A thread may be slow between its question and the gate."""
        self.ask_at_the_door(way, self.asker(name), 1, timeout, REFUSED[self.when_full]).asker = name

    @precondition(lambda self: self.asked)
    @rule(number=PICK)
    def goes_through_the_door(self, number: int) -> None:
        self.pick(number).door.set()

    # --- what readers and waiters do ---

    @precondition(lambda self: self.asked)
    @rule(number=PICK)
    def reads_on(self, number: int) -> None:
        self.pick(number).read_on()

    @precondition(lambda self: self.asked)
    @rule(number=PICK, how=st.sampled_from(["break", "close"]))
    def leaves(self, number: int, how: str) -> None:
        asked = self.pick(number)
        if asked.stream is not None:
            asked.left = True
            if how == "close":
                asked.stream.close()
            asked.read_on()

    @precondition(lambda self: self.asked)
    @rule(number=PICK)
    def cancels(self, number: int) -> None:
        """A future, or a task."""
        asked = self.pick(number)
        asked.may.add(CancelledError)
        if asked.future is not None:
            assert asked.future.cancel() or asked.future.done()
        elif asked.is_task:
            asked.end.cancel()

    # --- orders ---

    @precondition(lambda self: self.asked)
    @rule(number=PICK)
    def aborts(self, number: int) -> None:
        """By its id, wherever it is."""
        asked = self.pick(number)
        asked.may.add(RequestAbortedError)
        asked.due = asked.due or (len(asked.prompts) == 1 and self.lives(asked))
        for index in range(len(asked.prompts)):
            self.bridge.abort(asked.name if len(asked.prompts) == 1 else f"{asked.name}-{index}")

    @rule(name=st.sampled_from(CLIENTS))
    def closes_a_client(self, name: str) -> None:
        """What was asked through it ends, wherever it is; a new one has its name then."""
        self.clients[name].close()
        for asked in self.open:
            if asked.asker == name:
                asked.due = True
                asked.may.add(BridgeClosedError)
        self.clients[name] = self.bridge.client(name)

    # --- the engine and its loop ---

    @precondition(lambda self: self.release is None)
    @rule(steps=st.integers(1, 3))
    def makes_steps(self, steps: int) -> None:
        self.engines[-1].step(steps)

    @precondition(lambda self: self.asked)
    @rule(number=PICK, how=st.sampled_from(["fail", "refuse"]))
    def fails_one(self, number: int, how: str) -> None:
        asked = self.pick(number)
        asked.may.add(EngineError)
        if how == "fail":
            self.engines[-1].fail(asked.prompts[-1], ValueError("as told"))
        else:
            self.engines[-1].refuse(asked.prompts[-1], SystemExit("as told"))

    @precondition(lambda self: self.release is None)
    @rule()
    def crashes(self) -> None:
        built = len(self.engines)
        self.may_end_with(EngineDeadError)
        self.engines[-1].crash(ValueError("as told"))
        until(lambda: len(self.engines) > built and self.bridge.state == "ready")

    @precondition(lambda self: self.release is None)
    @rule()
    def gets_stuck(self) -> None:
        """The loop stands still, as in native code, until it is released; whoever waits must not."""
        self.release = threading.Event()
        self.engines[-1].block(self.release)

    @rule()
    def is_released(self) -> None:
        if self.release is not None:
            self.release.set()
            self.release = None

    # --- ending ---

    @precondition(lambda self: self.age >= 10)
    @rule()
    def closes_and_opens_anew(self) -> None:
        """With whatever is in flight: all of it ends at once, and nothing is left."""
        self.is_released()
        self.may_end_with(BridgeClosedError)
        self.bridge.close()
        for asked in self.open:
            asked.hurry()
        self.look_at_the_end()
        self.open_bridge()

    def come_to_an_end(self) -> None:
        self.is_released()
        for asked in self.open:
            asked.hurry()
        until(self.has_nothing_left_to_do, PATIENCE)
        self.bridge.close()

    def has_nothing_left_to_do(self) -> bool:
        self.engines[-1].step()
        return all(asked.end.done() for asked in self.open)


@pytest.mark.parametrize("length", lengths(60, 40))
def test_calls_in_any_order(length: settings) -> None:
    """Each call has one end, its own answer or the error of what was done to it, and nobody waits for nothing."""
    run_state_machine_as_test(CallsMachine, settings=length)
