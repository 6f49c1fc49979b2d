"""What everybody may see of the engine's life, and how those who wait for a part of it are told.

Rule: written by the server thread once that runs, or by whoever ends the server in its place; read by anyone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from lmbridge.errors import LMBridgeError
from lmbridge.messages import Task

State = Literal["new", "starting", "ready", "restarting", "unloaded", "draining", "failed", "closed"]


class Verdict:
    """How something ended that the server was asked for: told once, waited for by any thread.

    Nobody holds a lock in here, so an exception thrown into whoever waits holds up nobody else. (A Future's condition
    can be left locked that way, and the server thread would stick when it tells.)
    """

    __slots__ = ("_told", "_waiters")

    def __init__(self) -> None:
        self._told: list[BaseException | None] = []  # what was told, by any thread; the first counts
        self._waiters: deque[threading.Lock] = deque()  # one for each that waits, held; each step is atomic

    @property
    def told(self) -> bool:
        return bool(self._told)

    @property
    def error(self) -> BaseException | None:
        """What went wrong; None while nothing did."""
        return self._told[0] if self._told else None

    def tell(self, error: BaseException | None = None) -> None:
        """Say that it is done, or what went wrong. The first time counts; any thread."""
        self._told.append(error)
        with contextlib.suppress(IndexError):
            while True:
                self._waiters.popleft().release()

    def wait(self, seconds: float) -> bool:
        """Wait until it has been told, at most so many seconds; whether it has."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        try:
            if not self._told:  # after the append: who tells from now on sees the waiter
                waiter.acquire(timeout=max(0.0, seconds))
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
        return bool(self._told)


@dataclass
class Status:
    """The engine's state, and why it is in it.

    Attributes:
        reason: why it is not ready or, while it is, what holds the calls up; "" where there is no more to say.
        restarts: how often an engine that died was followed by another.
        ending: close() was called; while calls are finished the state stays ``draining``, whatever the engine does.
        ready: told when the engine is there or has failed for good; another takes its place when that changes.
        deaths: monotonic times; outlive a server thread that was replaced.
        tasks: what the last engine that was loaded does; known also while it is unloaded.
    """

    state: State = "new"
    reason: str = ""
    restarts: int = 0
    ending: bool = False
    ready: Verdict = field(default_factory=Verdict)
    deaths: deque[float] = field(default_factory=deque)
    tasks: frozenset[Task] = frozenset()

    def loading(self, reason: str = "") -> None:
        """There is no engine, and one is being loaded."""
        self._be("starting", reason)

    def loaded(self, tasks: frozenset[Task]) -> None:
        """An engine serves."""
        self.tasks = tasks
        self._be("ready", "")
        if self.ready.error is not None:
            self.ready = Verdict()
        self.ready.tell()

    def lost(self, what: str) -> None:
        """There is no engine after ``what`` happened, and another is on its way."""
        self._be("restarting", what)

    def unloaded(self, reason: str) -> None:
        """There is no engine, which had nothing to do; one is loaded for the next call."""
        self._be("unloaded", reason)
        if self.ready.told:
            self.ready = Verdict()

    def holds(self, reason: str) -> None:
        """Say what holds the calls up while the engine is well."""
        self.reason = reason

    def failed(self, error: LMBridgeError) -> None:
        """There is no engine, and there will be none unless one is swapped in."""
        self.state, self.reason = "failed", str(error)
        if self.ready.told:
            self.ready = Verdict()
        self.ready.tell(error)

    def drains(self) -> None:
        """What was begun is finished; then comes the end."""
        self.ending = True
        if self.state != "failed":
            self._be(self.state, self.reason)

    def _be(self, state: State, reason: str) -> None:
        self.state, self.reason = "draining" if self.ending else state, reason
