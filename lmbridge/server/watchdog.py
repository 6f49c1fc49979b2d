"""Detects a server thread that is stuck or has ended silently.

Rule: its own thread, which only reads and reports to the server thread's keeper. The sweep finds an engine that stalls
without blocking the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmbridge.log import logger
from lmbridge.server.clock import LookClock
from lmbridge.server.run import Run

LOOP_GRACE = 5.0  # more seconds for the loop itself: on a loaded machine it may be slow without being stuck
LONGEST_PAUSE = 5.0  # the longest interval between checks, in seconds


class Watchdog:
    """Monitors one run of the server; ends with it, or after reporting it stuck.

    Args:
        thread: the thread that runs it.
        stall_timeout: seconds without a heartbeat, plus some grace, after which it counts as stuck; None: never.
        on_stuck: called when it is stuck.
        on_end: called when the thread is gone.
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
        self._clock = LookClock()  # watchdog thread only, like the next two
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
            except BaseException:  # without it nobody would check
                logger.exception("The watchdog failed once and continues.")
        self._on_end(self._run, RuntimeError("it was killed"))

    def _stuck(self) -> bool:
        now, heartbeat = self._clock.look(self._pause), self._run.loop.sweep.heartbeat
        if heartbeat != self._heartbeat:
            self._heartbeat, self._since = heartbeat, now
        return self._stall_timeout is not None and now - self._since > self._stall_timeout + LOOP_GRACE
