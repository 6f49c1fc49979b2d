"""Wakes waiting threads a few at a time: each woken thread wakes the next.

Rule: the server thread enters waiters; each woken thread passes the chain on. A chain that stops is abandoned, and
every waiter looks again once a second, so that a lost link costs a second, not a thread.

A woken thread needs the GIL. Sixty threads woken at once queue for it: each is put to sleep and woken again, and the
server thread, with the engine's next step to run, queues behind all of them. In a chain about as many are awake as can
run, and a reader whose turn comes late finds its deltas merged.

Beside a busy Python thread the opposite holds: each hand-over costs that thread's whole turn (the switch interval, 5
ms), which waking everybody pays only once. So the server checks the pace and, where it is too slow, wakes everybody at
once for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

RUNNERS = 1  # how many the server thread wakes; measured with 1, 2 and 4
LOOK = 0.002  # seconds between checks of the pace
PACE = 8  # threads woken between two checks; fewer is too slow
PAUSES = (0.05, 1.0)  # seconds for which everybody is woken at once: the first time, and the most; it doubles


class WakeChain:
    """The threads still to be woken after the engine's last step."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop: asyncio.AbstractEventLoop  # set before any thread waits
        self._ring = ring  # the server's doorbell
        self._waiting: deque[threading.Lock] = deque()  # the server thread appends, any thread pops
        self._held_back = False  # a ring was postponed to the end of the chain: the last to wake rings
        self._passed = 0  # since the last check; approximate, since any thread adds to it
        self._thread_id: int | None = None  # the server thread's; only it touches the rest
        self.held = False  # nobody is woken until ``start`` is called
        self._look: asyncio.TimerHandle | None = None
        self._pause, self._pause_end = PAUSES[0], 0.0

    # --- any thread ---

    def pass_on(self) -> None:
        """Wake the next thread, or ring a postponed bell. Called by each woken thread."""
        if self._waiting:
            try:
                self._waiting.popleft().release()
            except IndexError:  # another thread was faster
                return
            self._passed += 1
        elif self._held_back:
            self._held_back = False
            self._ring()

    def ring(self) -> None:
        """Ring the doorbell; during a chain, only once for all threads woken in it."""
        self._held_back = True
        if not self._waiting:
            self._held_back = False
            self._ring()

    def wake(self, waiter: threading.Lock) -> None:
        """Wake a thread in its turn, or at once if not called by the server thread."""
        if threading.get_ident() != self._thread_id:
            waiter.release()
            return
        self._waiting.append(waiter)
        if not self.held:
            self.held = True
            self._loop.call_soon(self.start)

    def wake_all(self) -> None:
        """Wake all threads now."""
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().release()

    def close(self) -> None:
        """Wake all threads from now on: the server thread has ended or is stuck, and its id may be reused."""
        self._thread_id = None
        self.wake_all()

    # --- the server thread only ---

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the current thread the server's, with this loop."""
        self._loop = loop
        self.held, self._look, self._pause_end = False, None, 0.0
        self._thread_id = threading.get_ident()
        self.wake_all()

    def start(self) -> None:
        """Wake the first few; called after all deltas of one engine step."""
        self.held = False
        if self._pause_end and self._loop.time() < self._pause_end:
            self.wake_all()
            return
        try:
            for _ in range(RUNNERS):
                self._waiting.popleft().release()
        except IndexError:
            return
        if self._waiting and self._look is None:
            self._look_soon()

    def _look_soon(self) -> None:
        self._passed = 0
        self._look = self._loop.call_later(LOOK, self._look_at_pace)

    def _look_at_pace(self) -> None:
        self._look = None
        if not self._waiting:
            return
        if self._passed < PACE:
            self._pause_end = self._loop.time() + self._pause
            self._pause = min(self._pause * 2, PAUSES[1])
            self.wake_all()
        else:
            self._pause = PAUSES[0]
            self._look_soon()
