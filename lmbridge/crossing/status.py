"""The engine's state as everyone sees it, and how waiters learn of changes.

Rule: written by the running server thread, or by whoever ends the server for it; read by anyone.
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
    """The result of a request to the server: set once, awaited by any thread.

    Nobody holds a lock in here, so an exception thrown into a waiter blocks nobody else. (It could leave a Future's
    condition locked, and the server thread would hang.)
    """

    __slots__ = ("_told", "_waiters")

    def __init__(self) -> None:
        self._told: list[BaseException | None] = []  # results by any thread; the first counts
        self._waiters: deque[threading.Lock] = deque()  # one held lock per waiter; each step is atomic

    @property
    def told(self) -> bool:
        return bool(self._told)

    @property
    def error(self) -> BaseException | None:
        """The error; None if there is none."""
        return self._told[0] if self._told else None

    def tell(self, error: BaseException | None = None) -> None:
        """Report success or an error. The first report counts; any thread."""
        self._told.append(error)
        with contextlib.suppress(IndexError):
            while True:
                self._waiters.popleft().release()

    def wait(self, seconds: float) -> bool:
        """Wait for the result for at most ``seconds``; whether it has come."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        try:
            if not self._told:  # after the append: any later ``tell`` sees the waiter
                waiter.acquire(timeout=max(0.0, seconds))
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
        return bool(self._told)


@dataclass
class Status:
    """The engine's state and the reason for it.

    Attributes:
        reason: why it is not ready or, while it is, what delays calls; "" if there is nothing to add.
        restarts: how often a dead engine was replaced.
        ending: close() was called; while calls finish, the state stays ``draining``, whatever the engine does.
        ready: told when the engine is ready or has failed for good; replaced when that changes.
        deaths: monotonic times; kept when the server thread is replaced.
        tasks: the tasks of the last loaded engine; known even while it is unloaded.
    """

    state: State = "new"
    reason: str = ""
    restarts: int = 0
    ending: bool = False
    ready: Verdict = field(default_factory=Verdict)
    deaths: deque[float] = field(default_factory=deque)
    tasks: frozenset[Task] = frozenset()

    def loading(self, reason: str = "") -> None:
        """An engine is being loaded."""
        self._be("starting", reason)

    def loaded(self, tasks: frozenset[Task]) -> None:
        """An engine serves."""
        self.tasks = tasks
        self._be("ready", "")
        if self.ready.error is not None:
            self.ready = Verdict()
        self.ready.tell()

    def lost(self, what: str) -> None:
        """The engine was lost because of ``what``; another is on its way."""
        self._be("restarting", what)

    def unloaded(self, reason: str) -> None:
        """The idle engine was unloaded; the next call loads it again."""
        self._be("unloaded", reason)
        if self.ready.told:
            self.ready = Verdict()

    def holds(self, reason: str) -> None:
        """Say what delays calls while the engine is healthy."""
        self.reason = reason

    def failed(self, error: LMBridgeError) -> None:
        """There is no engine, and only a swap can bring one."""
        self.state, self.reason = "failed", str(error)
        if self.ready.told:
            self.ready = Verdict()
        self.ready.tell(error)

    def drains(self) -> None:
        """Existing calls finish; then the bridge ends."""
        self.ending = True
        if self.state != "failed":
            self._be(self.state, self.reason)

    def _be(self, state: State, reason: str) -> None:
        self.state, self.reason = "draining" if self.ending else state, reason
