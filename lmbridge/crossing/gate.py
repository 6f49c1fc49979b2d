"""The bounded gate in front of the queue of turns, and the book of all calls that were made.

Rule: entered on the caller's thread, left on the server thread. Nobody blocks in here: who has to wait is told by a
token in a channel, and looks again at least once a second, so that a token that is lost costs a second and no caller.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.errors import LMBridgeError, QueueFullError
from lmbridge.metrics import Metrics

IDLE_CLIENTS = 256  # of how many clients that have nothing inside the gate keeps the (empty) books

REFUSED = QueueFullError.__name__

Wake = Callable[[], None]


class Gate:
    """Bounds how many requests wait for the engine, in all and per client.

    A place that falls free is handed to a caller that waits, clients in turns, rather than raced for. Each step takes
    the same time however many wait.

    Attributes:
        calls: every call from its first question here to the server's final word.
    """

    def __init__(self, max_pending: int, max_pending_per_client: int, reject: bool, metrics: Metrics) -> None:
        self._max_pending = max_pending
        self._max_per_client = max_pending_per_client
        self._reject = reject
        self._metrics = metrics
        self._lock = threading.RLock()
        # Exceptions may strike between any two steps in here. Each entry is made and removed by one atomic step, so
        # none is miscounted, and ``stand`` mends what was left half done. All are guarded by _lock, but for removals
        # from ``calls``, which the server thread makes.
        self.calls: dict[Call, None] = {}
        self._inside: dict[Call, None] = {}
        self._of_client: dict[str, dict[Call, None]] = {}
        self._lines: dict[str, OrderedDict[Call, Wake]] = {}  # who waits, by client; no line is empty
        self._ready: OrderedDict[str, None] = OrderedDict()  # clients with a line and room of their own, in turns
        self._closed: Callable[[], LMBridgeError] | None = None

    @property
    def pending(self) -> int:
        """How many calls have a place."""
        return len(self._inside)

    @property
    def empty(self) -> bool:
        """Whether nobody has a place or waits for one."""
        return not self._inside and not self._lines

    def inside(self) -> list[Call]:
        """The calls that have a place now."""
        return list(self._inside)

    # --- the caller's end ---

    def enter(self, call: Call, patient: bool = False) -> bool:
        """Enter a new call in the book, and give it a place if there is one; False: it has to stand in line.

        Args:
            patient: the caller has answers to wait for and will stand in line, also where the bridge rejects.

        Raises:
            QueueFullError: there is none, and the bridge was built with ``when_full="reject"``; the call is in no book.
            BridgeClosedError: the server has ended; the call is in no book.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            if call.outcomes:  # it was left before it was sent, and the final word on it may have been said
                return True
            self.calls[call] = None  # with no call between this and the count, no exception comes between them either
            self._metrics.started += 1
            if self._try_enter(call):
                return True
            if patient or not self._reject:
                return False
            del self.calls[call]
            self._metrics.outcomes[REFUSED] += 1  # which the server never counts
        raise QueueFullError(
            f"{self.pending} requests wait already (max_pending={self._max_pending}, max_pending_per_client="
            f"{self._max_per_client}); this one was not taken. Try again later, or use when_full='block'."
        )

    def stand(self, call: Call, wake: Wake) -> bool:
        """Stand in line for a place, or stay there; True when the call has one. To be asked again once a second.

        Args:
            wake: called, by any thread, when the call has been given a place.
        """
        with self._lock:
            if call.admitted or self._closed is not None:
                return True
            line = self._lines.setdefault(call.request.client, OrderedDict())
            if call not in line:
                line[call] = wake
            self._line_up(call.request.client)
            self._hand_over()
            return call.admitted

    def stays(self, call: Call) -> bool:
        """Whether a call that is not admitted still stands in line; True for one that is. Takes no lock."""
        line = self._lines.get(call.request.client)
        return call.admitted or self._closed is not None or (line is not None and call in line)

    def forget(self, call: Call) -> None:
        """Take a call that ends out of the line, and off its place; a second time does nothing. Any thread."""
        with self._lock:
            wake = self._step_out(call)
        self.leave(call)
        if wake is not None:
            wake()

    # --- the loop end ---

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
            if self._lines:
                self._line_up(client)
                self._hand_over()

    def close(self, error: Callable[[], LMBridgeError]) -> list[Call]:
        """Refuse everybody with what ``error`` makes, and return the calls in the book; who waits here is woken."""
        with self._lock:
            self._closed = error
            wakes = [wake for line in self._lines.values() for wake in line.values()]
            self._lines.clear()
            self._ready.clear()
            self._inside.clear()
            self._of_client.clear()
        for wake in wakes:
            wake()
        return list(self.calls)

    # --- with the lock held ---

    def _try_enter(self, call: Call) -> bool:
        client = call.request.client
        if len(self._inside) >= self._max_pending:
            return False
        of_client = self._of_client.get(client)
        if of_client is None:
            self._of_client[client] = {call: None}
        elif len(of_client) >= self._max_per_client:
            return False
        else:
            of_client[call] = None
        self._inside[call] = None
        call.admitted = True
        return True

    def _has_own_room(self, client: str) -> bool:
        of_client = self._of_client.get(client)
        return of_client is None or len(of_client) < self._max_per_client

    def _line_up(self, client: str) -> None:
        """Let a client that waits and has room of its own take turns."""
        if client in self._lines and client not in self._ready and self._has_own_room(client):
            self._ready[client] = None

    def _step_out(self, call: Call) -> Wake | None:
        client = call.request.client
        line = self._lines.get(client)
        if line is None:
            return None
        wake = line.pop(call, None)
        if not line:
            self._lines.pop(client, None)
            self._ready.pop(client, None)
        return wake

    def _hand_over(self) -> None:
        """Give the places that are free to those who wait, clients in turns."""
        while self._ready and len(self._inside) < self._max_pending:
            client, _ = self._ready.popitem(last=False)
            line = self._lines.get(client)
            if not line:
                continue
            call = next(iter(line))
            wake = line[call]
            gone = call.admitted or bool(call.outcomes)  # it was interrupted half way, or ended while it waited
            if gone or self._try_enter(call):
                self._step_out(call)
                wake()
            self._line_up(client)
