"""Wakes waiting threads a few at a time: each that wakes, wakes the next.

Rule: the server thread enters waiters; whichever thread wakes passes the chain on. A chain that stops is given up, and
whoever waits looks by himself once a second, so a link that is lost costs a second and no thread.

A thread that wakes needs the GIL. Sixty that are woken at once queue for it: each is put to sleep and woken again on
its way, and the server thread, with the engine's next step in its hands, has to queue behind all of them. In a chain
about as many are awake as can run, and a reader whose turn comes late finds its deltas merged.

Beside a busy Python thread it is the other way round: each hand-over costs that thread's whole turn (the switch
interval, 5 ms), which a crowd pays once. So the server looks at the pace, and wakes everybody at once for a while where
it is too slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

RUNNERS = 1  # how many the server thread wakes; measured with 1, 2 and 4
LOOK = 0.002  # seconds between two looks at the pace
PACE = 8  # threads woken between two looks; fewer is too slow
PAUSES = (0.05, 1.0)  # seconds for which everybody is woken at once: the first time, and at most; it doubles


class WakeChain:
    """The threads still to be woken after the engine's last step."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop: asyncio.AbstractEventLoop  # set before anybody waits
        self._ring = ring  # the server's doorbell
        self._waiting: deque[threading.Lock] = deque()  # appended by the server thread, popped by any
        self._held_back = False  # somebody did not ring because a chain is on: whoever wakes last does
        self._passed = 0  # since the last look; a rough count, since any thread adds to it
        self._thread_id: int | None = None  # the server thread's; it alone touches the rest
        self.held = False  # ``start`` will be called: nobody is woken before
        self._look: asyncio.TimerHandle | None = None
        self._pause, self._pause_end = PAUSES[0], 0.0

    # --- any thread ---

    def pass_on(self) -> None:
        """Wake the next, or ring for those that did not. Called by each thread when it has woken."""
        if self._waiting:
            try:
                self._waiting.popleft().release()
            except IndexError:  # another was faster
                return
            self._passed += 1
        elif self._held_back:
            self._held_back = False
            self._ring()

    def ring(self) -> None:
        """Ring the doorbell; while a chain is on, only once for all who wake in it."""
        self._held_back = True
        if not self._waiting:
            self._held_back = False
            self._ring()

    def wake(self, waiter: threading.Lock) -> None:
        """Wake a thread in its turn; at once when another than the server thread asks."""
        if threading.get_ident() != self._thread_id:
            waiter.release()
            return
        self._waiting.append(waiter)
        if not self.held:
            self.held = True
            self._loop.call_soon(self.start)

    def wake_all(self) -> None:
        """Wake everybody now."""
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().release()

    def close(self) -> None:
        """Wake everybody, now and from now on: the server thread has ended or is stuck, and its id may be used anew."""
        self._thread_id = None
        self.wake_all()

    # --- the server thread only ---

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say that this thread is the server's, and which is its loop."""
        self._loop = loop
        self.held, self._look, self._pause_end = False, None, 0.0
        self._thread_id = threading.get_ident()
        self.wake_all()

    def start(self) -> None:
        """Wake the first few; comes after everything the engine had to say in one step."""
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
