"""Notices an engine that makes no progress at all, even when it blocks the loop.

Rule: a thread of its own, which only reads the server's counters and, when they stand still, says so: to the loop while
that still answers, else to the server thread's keeper, which leaves the stuck thread behind.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from lmbridge.server.loop import ServerLoop
from lmbridge.server.place import Place

LOOP_GRACE = 5.0  # seconds more for the loop itself: on a crowded machine it may be slow, and is not stuck then


class Watchdog:
    """Watches one server. Ends with it, or once it has been replaced."""

    def __init__(
        self,
        server: ServerLoop,
        thread: threading.Thread,
        stall_timeout: float,
        replace: Callable[[ServerLoop, threading.Thread], None],
    ) -> None:
        self._server = server
        self._watched = thread
        self._stall_timeout = stall_timeout
        self._replace = weakref.WeakMethod(replace)
        self._place: Place | None = None
        self._progress = -1
        self._since = time.monotonic()  # when progress was last seen, or none was due

    def start(self) -> None:
        threading.Thread(target=self._watch, name="lmbridge watchdog", daemon=True).start()

    def _watch(self) -> None:
        while self._watched.is_alive():
            self._watched.join(min(self._stall_timeout / 4, 5.0))
            now = time.monotonic()
            if now - self._server.sweep.heartbeat > self._stall_timeout + LOOP_GRACE:
                replace = self._replace()
                if replace is not None:
                    replace(self._server, self._watched)
                return
            self._look_at_engine(now)

    def _look_at_engine(self, now: float) -> None:
        place = self._server.calls.place
        if place is None or not place.calls or (place, place.progress) != (self._place, self._progress):
            self._since = now
            if place is not None:
                self._place, self._progress = place, place.progress
        elif now - self._since > self._stall_timeout:
            self._since = now
            cause = place.stall(self._stall_timeout)
            self._server.handle.run_soon(lambda: place.die(cause))
