"""Notices a server thread that is stuck, and one that has ended without a word.

Rule: a thread of its own, which only reads and, when it finds something, tells the server thread's keeper. An engine
that stands still without blocking the loop is the sweep's to find.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmbridge.log import logger
from lmbridge.server.clock import LookClock
from lmbridge.server.run import Run

LOOP_GRACE = 5.0  # seconds more for the loop itself: on a crowded machine it may be slow, and is not stuck then
LONGEST_PAUSE = 5.0  # seconds between two looks


class Watchdog:
    """Watches one run of the server; ends with it, or once it was told to be stuck.

    Args:
        thread: the one that runs it.
        stall_timeout: seconds without a sign of life, besides some grace, after which it is stuck; None: never.
        on_stuck: told when it is.
        on_end: told when the thread is not there any more.
    """

    def __init__(
        self,
        run: Run,
        thread: threading.Thread,
        stall_timeout: float | None,
        on_stuck: Callable[[Run], None],
        on_end: Callable[[Run, BaseException], None],
    ) -> None:
        self._run = run
        self._thread = thread
        self._stall_timeout = stall_timeout
        self._on_stuck = on_stuck
        self._on_end = on_end
        self._pause = LONGEST_PAUSE if stall_timeout is None else min(stall_timeout / 4, LONGEST_PAUSE)
        self._clock = LookClock()  # the watchdog's thread only, as are the next two
        self._heartbeat = 0.0  # the last one seen
        self._since = 0.0  # when that was, by the clock

    def start(self) -> None:
        threading.Thread(target=self._watch, name="lmbridge watchdog", daemon=True).start()

    def _watch(self) -> None:
        while self._thread.is_alive() and not self._run.gone.told:
            try:
                if not self._run.gone.wait(self._pause) and self._stuck():
                    self._on_stuck(self._run)
                    return
            except BaseException:  # without it nobody would look any more
                logger.exception("The watchdog failed; it goes on.")
        self._on_end(self._run, RuntimeError("it was killed"))

    def _stuck(self) -> bool:
        now, heartbeat = self._clock.look(self._pause), self._run.loop.sweep.heartbeat
        if heartbeat != self._heartbeat:
            self._heartbeat, self._since = heartbeat, now
        return self._stall_timeout is not None and now - self._since > self._stall_timeout + LOOP_GRACE
