"""A clock for measuring how long others are silent.

Rule: each clock belongs to one thread.
"""

from __future__ import annotations

import time

SLACK = 0.5  # seconds by which a look may be late before it counts as a pause


class LookClock:
    """Counts only the seconds in which its owner, and so the threads it watches, could run.

    After a pause of the whole process (SIGSTOP, a debugger, a paused container) this clock goes on where it was; by any
    other clock every thread would seem to have been silent all the while.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._looked = time.monotonic()

    def look(self, due: float) -> float:
        """The time of this look, in seconds since the first.

        Args:
            due: seconds after the last look at which this one was due.
        """
        looked = time.monotonic()
        self._now += min(looked - self._looked, due + SLACK)
        self._looked = looked
        return self._now
