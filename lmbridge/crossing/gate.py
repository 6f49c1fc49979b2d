"""The bounded gate in front of the queue of turns: who may wait for the engine.

Rule: entered on the caller's thread, left on the server thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.errors import QueueFullError
from lmbridge.metrics import Metrics

IDLE_CLIENTS = 256  # of how many clients that have nothing inside the gate keeps the (empty) books


class Gate:
    """Bounds how many requests wait for the engine, in all and per client.

    A place that falls free is handed to the caller that has waited longest, rather than raced for.
    """

    def __init__(self, max_pending: int, max_pending_per_client: int, reject: bool, metrics: Metrics) -> None:
        self._max_pending = max_pending
        self._max_per_client = max_pending_per_client
        self._reject = reject
        self._metrics = metrics
        self._lock = threading.RLock()
        # A call is inside when it is a key here. Each entry is made and removed by one atomic step, so that a caller
        # who is interrupted in between leaves nothing miscounted. Guarded by _lock, as are the next three.
        self._inside: dict[Call, None] = {}
        self._of_client: dict[str, dict[Call, None]] = {}
        self._waiters: deque[tuple[Call, Callable[[], None]]] = deque()
        self._open = True

    @property
    def pending(self) -> int:
        return len(self._inside)

    def inside(self) -> list[Call]:
        """The calls that have a place now."""
        return list(self._inside)

    def try_enter(self, call: Call) -> bool:
        """Take a place if there is one. Once the gate is closed everybody passes, to be refused further on."""
        client = call.request.client
        with self._lock:
            of_client = self._of_client.get(client)
            if self._open:
                if len(self._inside) >= self._max_pending:
                    return False
                if of_client is not None and len(of_client) >= self._max_per_client:
                    return False
            if of_client is None:
                self._of_client[client] = {call: None}
            else:
                of_client[call] = None
            self._inside[call] = None
            return True

    def enter(self, call: Call) -> bool:
        """Take a place, waiting for one up to the request's deadline; False when that has passed.

        Raises:
            QueueFullError: there is no place and the bridge was built with ``when_full="reject"``.
        """
        if self.try_enter(call):
            return True
        self._refuse_if_rejecting(call)
        woken = threading.Event()
        if self._wait(call, woken.set):
            return True
        deadline = call.request.deadline
        try:
            woken.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except BaseException:
            self._forget(call)
            self.leave(call)
            raise
        self._forget(call)
        return call in self._inside

    async def enter_async(self, call: Call) -> bool:
        """``enter`` for a caller on another event loop, which must not be blocked."""
        if self.try_enter(call):
            return True
        self._refuse_if_rejecting(call)
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        if self._wait(call, lambda: _wake(loop, woken)):
            return True
        deadline = call.request.deadline
        try:
            await asyncio.wait_for(woken.wait(), None if deadline is None else deadline - time.monotonic())
        except TimeoutError:
            pass
        except BaseException:
            self._forget(call)
            self.leave(call)
            raise
        self._forget(call)
        return call in self._inside

    def leave(self, call: Call) -> None:
        """Give the place back; a second time does nothing. Any thread."""
        if call not in self._inside:
            return
        with self._lock:
            client = call.request.client
            self._inside.pop(call, None)
            of_client = self._of_client.get(client)
            if of_client is not None:
                of_client.pop(call, None)
                if not of_client and len(self._of_client) > IDLE_CLIENTS:
                    del self._of_client[client]
            if self._waiters:
                self._hand_over()

    def close(self) -> None:
        """Wake everybody who waits here, and hold nobody any more."""
        with self._lock:
            self._open = False
            self._hand_over()

    def _hand_over(self) -> None:
        """Admit the longest waiting callers that fit; those whose own client is full keep their place in the line."""
        for waiter in list(self._waiters):
            call, wake = waiter
            if self.try_enter(call):
                self._waiters.remove(waiter)
                wake()
            elif len(self._inside) >= self._max_pending:
                return

    def _wait(self, call: Call, wake: Callable[[], None]) -> bool:
        """Stand in line; True when a place fell free meanwhile."""
        with self._lock:
            if self.try_enter(call):
                return True
            self._waiters.append((call, wake))
            return False

    def _forget(self, call: Call) -> None:
        with self._lock:
            self._waiters = deque(waiter for waiter in self._waiters if waiter[0] is not call)

    def _refuse_if_rejecting(self, call: Call) -> None:
        if not self._reject:
            return
        self._metrics.refused()
        raise QueueFullError(
            f"{self.pending} requests wait already (max_pending={self._max_pending}, max_pending_per_client="
            f"{self._max_per_client}); this one was not taken. Try again later, or use when_full='block'."
        )


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # that loop has been closed: nobody waits there any more
        loop.call_soon_threadsafe(event.set)
