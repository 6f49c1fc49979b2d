"""Periodic checks for what no bell announces: lost callers, deadlines, idle channels, forgotten calls.

Rule: server thread only.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.crossing.endings import forgotten_error, interrupted_error
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.handle import ServerHandle
from lmbridge.log import logger
from lmbridge.server.border import name_of
from lmbridge.server.calls import Calls
from lmbridge.server.clock import LookClock
from lmbridge.server.inbox import Inbox
from lmbridge.server.place import Place

INTERVAL = 0.5  # seconds between sweeps
SLOW_LOOKS = 2  # after this many sweeps a missing call loses its place at the gate
LOST_LOOKS = 120  # after this many its caller counts as killed, not slow


def _is_astray(gate: Gate, call: Call) -> bool:
    """Whether a call unknown to the server is not in line either: its caller may be about to send it."""
    return call.admitted or bool(call.outcomes) or not gate.stays(call)


def _nobody() -> None:
    """Stands in for a helper that is gone."""


class Sweep:
    """The server's backstop.

    Attributes:
        heartbeat: monotonic time of the last sweep; read by anyone.
        places: of every engine from being built to its end, retired ones included.
    """

    def __init__(self, handle: ServerHandle, calls: Calls, inbox: Inbox, stall_timeout: float | None) -> None:
        self.heartbeat = time.monotonic()
        self.places: list[Place] = []
        self._handle = handle
        self._calls = calls
        self._inbox = inbox
        self._stall_timeout = stall_timeout
        self._clock = LookClock()
        self._missing: dict[Call, int] = {}  # for how many sweeps in a row a call was registered but nowhere else

    async def run(self) -> None:
        """Sweep until the thread ends or is left behind."""
        while not self._calls.left_behind:
            now = self._clock.look(INTERVAL)
            self.heartbeat = time.monotonic()
            for step in self._steps(now):
                try:
                    step()
                except Exception:  # the sweep must go on, and one failing step must not skip others
                    logger.exception("A step of the server's sweep failed; the sweep continues.")
            await asyncio.sleep(INTERVAL)

    def _steps(self, now: float) -> list[Callable[[], object]]:
        return [
            self._handle.bell.answer,  # also lowers a flag whose ringer was interrupted
            self._find_lost,
            functools.partial(self._expire, self.heartbeat),
            functools.partial(self._look_at_engines, now),
            self._calls.pump,  # an engine that was busy may have room again
            self._handle.channels.trim,
            *[helper() or _nobody for helper in self._handle.helpers],
        ]

    def _find_lost(self) -> None:
        """Take in unannounced calls, and end those never sent because their caller was killed."""
        gate = self._handle.gate
        for call in self._nowhere():
            self._inbox.collect(call.channel)
        self._missing = {call: self._missing.get(call, 0) + 1 for call in self._nowhere()}
        for call, looks in self._missing.items():
            if looks >= SLOW_LOOKS:  # if its caller is merely slow, the queue exceeds its limit by one
                gate.leave(call)
            if (looks >= LOST_LOOKS and not call.kept) or (call.outcomes and looks >= SLOW_LOOKS):
                call.settle(interrupted_error())
                self._calls.abort(call)

    def _nowhere(self) -> list[Call]:
        """Registered calls that are neither with the server nor in line at the gate."""
        gate, living = self._handle.gate, self._calls.living
        return [c for c in list(gate.calls) if living.get(c.request.id) is not c and _is_astray(gate, c)]

    def _expire(self, now: float) -> None:
        """End overdue calls that nobody is waiting on."""
        for call in list(self._handle.gate.calls):
            deadline = call.request.deadline
            if deadline is not None and now > deadline:
                self._handle.expire(call)

    def _look_at_engines(self, now: float) -> None:
        """Find stalled engines, and calls that an engine has forgotten.

        The watchdog finds an engine that blocks the loop, and this sweep with it.
        """
        for place in list(self.places):
            place.look(now)
            if self._stall_timeout is None:
                continue
            if place.standstill > self._stall_timeout:
                place.die(place.stall(self._stall_timeout))
            else:
                self._end_forgotten(place, self._stall_timeout, now)

    def _end_forgotten(self, place: Place, patience: float, now: float) -> None:
        name = name_of(place.engine)
        for call in place.unanswered(patience, now):
            logger.warning("The engine %s does not release request %s, which was aborted.", name, call.request.id)
            self._calls.let_go(call)
        for call in place.forgotten(patience, now):
            if call.settle(forgotten_error(patience)):
                logger.warning("The engine %s makes no progress on request %s; aborting it.", name, call.request.id)
                self._calls.abort(call)
