"""What the state machines of a bridge share: its engines, whoever asks, and what has to hold after every step.

Rule: the machine's own thread waits for nothing without a limit. Time passes in steps of the engines; where the bridge
looks for itself every so often it does so much more often here, so that nobody waits for that.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant

import lmbridge.caller.dispatcher
import lmbridge.caller.futures
import lmbridge.caller.other_loop
import lmbridge.caller.sender
import lmbridge.caller.streams
import lmbridge.crossing.channel
import lmbridge.crossing.handle
import lmbridge.server.supervisor
import lmbridge.server.sweep
from lmbridge import Bridge, Client, QueueFullError, RequestTimeoutError
from lmbridge.crossing.call import Call
from lmbridge.crossing.gate import Gate
from lmbridge.testing import ScriptedEngine
from tests.bridge.asked import LISTS, PATIENCE, WAYS, Asked, OtherLoop, in_thread
from tests.conftest import until

QUICK = 0.05  # seconds between two looks at what was not announced, instead of up to a second
LOOKERS = (
    lmbridge.crossing.channel, lmbridge.crossing.handle, lmbridge.caller.other_loop, lmbridge.caller.sender,
    lmbridge.caller.streams, lmbridge.caller.futures,
)  # fmt: skip


def lengths(examples: int, steps: int) -> list[Any]:
    """For ``parametrize``: so many examples in every run, always the same, and fifty times as many in long ones."""
    common: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
        "stateful_step_count": steps,
    }
    return [
        pytest.param(
            settings(max_examples=examples, derandomize=True, phases=[Phase.generate], **common), id=f"{examples}"
        ),
        pytest.param(
            settings(max_examples=50 * examples, database=None, **common),
            id=f"{50 * examples}",
            marks=[pytest.mark.long, pytest.mark.timeout(1800)],
        ),
    ]


class Machine(RuleBasedStateMachine):
    """Drives one bridge after another."""

    bridge: Bridge

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.threads = set(threading.enumerate())
        self.engines: list[ScriptedEngine] = []
        self.asked: list[Asked] = []  # of all bridges
        self.open: list[Asked] = []  # those that have not been seen to end
        self.doors: dict[str, threading.Event] = {}  # by request id: its call enters the gate when this is set
        self.age = 0  # how many steps the bridge has lived
        self.other_loop = OtherLoop()
        self.patch.setattr(logging.getLogger("lmbridge"), "disabled", True)
        for module in LOOKERS:
            self.patch.setattr(module, "SLICE", QUICK)
        self.patch.setattr(lmbridge.caller.dispatcher, "LOOK", QUICK)
        self.patch.setattr(lmbridge.server.sweep, "INTERVAL", QUICK)
        self.patch.setattr(lmbridge.server.sweep, "LOST_LOOKS", 10_000)  # nobody is killed here, only slow
        self.patch.setattr(lmbridge.server.sweep, "SLOW_LOOKS", 1_000)
        self.patch.setattr(lmbridge.server.supervisor, "FIRST_BACKOFF", 0.0)
        self._put_doors_before_the_gate()

    def _put_doors_before_the_gate(self) -> None:
        enter = Gate.enter

        def enter_by_door(gate: Gate, call: Call, patient: bool = False) -> bool:
            door = self.doors.get(call.request.id)
            if door is not None:
                assert door.wait(PATIENCE)
            return enter(gate, call, patient)

        self.patch.setattr(Gate, "enter", enter_by_door)

    # --- for rules ---

    def ask(
        self, way: str, asker: Bridge | Client, words: int, timeout: float | None, may: set[type[BaseException]]
    ) -> Asked:
        """Ask in that way, and return when the call is somewhere."""
        asked = self._prepare(way, words, timeout, may)
        if way in WAYS:
            asked.end = in_thread(lambda: WAYS[way](asker, asked))
        else:
            asked.end = self.other_loop.ask(way, asker, asked)
        self._let_settle(asked)
        return asked

    def ask_at_the_door(
        self, way: str, asker: Bridge | Client, words: int, timeout: float | None, may: set[type[BaseException]]
    ) -> Asked:
        """Ask, and be held up in front of the gate; one prompt, from a thread."""
        asked = self._prepare(way, words, timeout, may)
        asked.door.clear()
        self.doors[asked.name] = asked.door
        asked.end = in_thread(lambda: WAYS[way](asker, asked))
        return asked

    def _prepare(self, way: str, words: int, timeout: float | None, may: set[type[BaseException]]) -> Asked:
        number = len(self.asked)
        first = " ".join([f"prompt-{number}", *["word"] * words])
        prompts = [first, f"{first} two", f"{first} and three"] if way in LISTS else [first]
        asked = Asked(way, prompts, f"n{number}", timeout, set(may))
        if timeout is not None:
            asked.may.add(RequestTimeoutError)
        self.asked.append(asked)
        self.open.append(asked)
        return asked

    def _let_settle(self, asked: Asked) -> None:
        until(lambda: asked.end.done() or asked.pausing.is_set() or self.lives(asked))

    def pick(self, number: int) -> Asked:
        """One of the last calls, most of which live."""
        return self.asked[-1 - number % min(len(self.asked), 8)]

    def lives(self, asked: Asked) -> bool:
        """Whether any of its requests lives."""
        return any(asked.is_named(info.id) for info in self.bridge.requests())

    def may_end_with(self, error: type[BaseException]) -> None:
        """All that has not ended may end with that error from now on."""
        for asked in self.open:
            asked.may.add(error)

    # --- what has to hold ---

    @invariant()
    def each_call_lives_or_has_ended_rightly(self) -> None:
        """Who waits has a request that lives; who was stopped, or whose time is up, waits no more; all are counted."""
        if not hasattr(self, "bridge"):
            return
        self.age += 1
        wrongs: list[str] = []

        def is_right() -> bool:
            wrongs[:] = self._wrongs()
            return not wrongs

        with suppress(TimeoutError):
            until(is_right)
        assert not wrongs, wrongs
        for asked in [asked for asked in self.open if asked.end.done()]:
            self.open.remove(asked)
            asked.check()

    def _wrongs(self) -> list[str]:
        """What is not as it has to be; for a moment it may be so."""
        now = time.monotonic()
        waiting = [asked for asked in self.open if not asked.end.done() and not asked.held]
        return [
            *(f"{asked!r} waits, and does not live" for asked in waiting if not self.lives(asked)),
            *(f"{asked!r} waits, and was stopped" for asked in waiting if asked.due),
            *(f"{asked!r} waits, past its deadline" for asked in waiting if asked.deadline and now > asked.deadline),
            *([f"{self.balance()} calls are not counted"] if self.balance() else []),
        ]

    def balance(self) -> int:
        """How many calls were made that neither live nor are counted as ended."""
        metrics = self.bridge.metrics
        return metrics.started - sum(metrics.outcomes.values()) - len(self.bridge._server_thread.living())

    def look_at_the_end(self) -> None:
        """After a close: every call has ended, is counted, and nothing is left."""
        until(lambda: all(asked.end.done() for asked in self.open))
        for asked in self.open:
            asked.check()
        self.open.clear()
        until(lambda: self._own_threads() == [])  # the callbacks of the last ones have run then
        assert self.bridge.requests() == []
        gate = self.bridge._server_thread.handle.gate
        assert (gate.pending, gate.empty, self.balance()) == (0, True, 0)
        assert [engine for engine in self.engines if engine.active or not engine.closed] == []
        assert [asked.name for asked in self.asked if asked.called != (asked.future is not None)] == []

    def _own_threads(self) -> list[str]:
        return [t.name for t in threading.enumerate() if t not in self.threads and t.name.startswith("lmbridge")]

    def teardown(self) -> None:
        try:
            if hasattr(self, "bridge"):
                self.come_to_an_end()
                self.look_at_the_end()
            self.other_loop.close()
        finally:
            self.patch.undo()

    def come_to_an_end(self) -> None:
        """Have all calls answered and close the bridge."""
        raise NotImplementedError


REFUSED: dict[str, set[type[BaseException]]] = {"block": set(), "reject": {QueueFullError}}
