"""What everybody in a round shares: the bridge, what was made known to others, how many calls were made, how far it is.

Rule: used by every thread of the storm at once; knows neither callers nor engines.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineStartError
from lmbridge.testing.storm.plan import Plan

EVERY = 25  # calls between two words to those who wait for a number of them


class Scene:
    """One round, as its callers see it.

    Attributes:
        bridge: what everybody calls; None when the round is through.
        closing: its close has begun; set once, by who closes, as are the next two.
        closed_at: monotonic time at which its close had returned; None before.
        promised: ids of the requests that a draining close must finish, until that monotonic time.
        over: nobody is to ask any more.
        futures: nobody waits for these; any thread appends, as to the next three.
        streams: anybody may close these.
        clients: anybody may use and close these.
        ids: anybody may abort these.
    """

    def __init__(self, number: int, plan: Plan, bridge: Any) -> None:
        self.plan = plan
        self.bridge = bridge
        self.closing = False
        self.closed_at: float | None = None
        self.promised: tuple[frozenset[str], float] = frozenset(), 0.0
        self.over = threading.Event()
        self.futures: deque[Any] = deque()
        self.streams: deque[Any] = deque()
        self.clients: deque[Any] = deque()
        self.ids: deque[str] = deque(maxlen=64)
        self._number = number
        self._changed = threading.Condition()
        self._certain = 0  # calls that the bridge must have counted; guarded by _changed, as are the next two
        self._possible = 0  # calls that it may have
        self._down = False  # somebody was told that nobody is served any more

    def __str__(self) -> str:
        return f"round {self._number} ({self.plan})"

    @property
    def made(self) -> tuple[int, int]:
        """How many calls the bridge must have counted, and how many it may have."""
        return self._certain, self._possible

    def count(self, certain: int, possible: int) -> None:
        """So many more calls were made."""
        with self._changed:
            before = self._possible
            self._certain += certain
            self._possible += possible
            if before // EVERY != self._possible // EVERY:
                self._changed.notify_all()

    def ends_with(self, error: BaseException) -> bool:
        """Whether a caller who got this need not ask again; the round is over soon then."""
        if not isinstance(error, EngineStartError | EngineDeadError | BridgeClosedError) or error.retryable:
            return False
        with self._changed:
            self._down = True
            self._changed.notify_all()
        return True

    def wait_for(self, calls: int, limit: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Return when ``calls`` have been made or nobody is served any more; False after ``limit`` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._possible >= calls or self._down or self.over.is_set() or enough(), limit
            )

    def stop_asking(self) -> None:
        """The round is over."""
        self.over.set()
        with self._changed:
            self._changed.notify_all()
