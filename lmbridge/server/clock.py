"""A clock for whoever judges others by how long they are silent.

Rule: one thread for each clock.
"""

from __future__ import annotations

import time

SLACK = 0.5  # seconds by which a look may be late before that counts as a pause


class LookClock:
    """Counts the seconds in which its owner could look, and with it those whom it looks at could work.

    A process that was stopped (SIGSTOP, a debugger, a paused container) goes on where it was; so does this clock, where
    by any other everybody in it would have been silent for as long.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._looked = time.monotonic()

    def look(self, due: float) -> float:
        """The time of this look, in seconds since the first.

        Args:
            due: seconds after the last look at which this one was to come.
        """
        looked = time.monotonic()
        self._now += min(looked - self._looked, due + SLACK)
        self._looked = looked
        return self._now
