"""The bounded gate in front of the turn queue, and the registry of all calls.

Rule: entered on the caller's thread, left on the server thread. Nothing blocks here: a waiter is woken by a token in a
channel, and looks again at least once a second, so that a lost token costs a second, not a caller.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from lmbridge.crossing.call import Call
from lmbridge.errors import LMBridgeError, QueueFullError
from lmbridge.metrics import Metrics

IDLE_CLIENTS = 256  # how many idle clients keep their (empty) entries

REFUSED = QueueFullError.__name__

Wake = Callable[[], None]


class Gate:
    """Bounds how many requests wait for the engine, in all and per client.

    A free place goes to a waiting caller, clients in turns, instead of to whoever asks first. Each step takes constant
    time, however many wait.

    Attributes:
        calls: every call, from entering here until the server is done with it.
    """

    def __init__(self, max_pending: int, max_pending_per_client: int, reject: bool, metrics: Metrics) -> None:
        self._max_pending = max_pending
        self._max_per_client = max_pending_per_client
        self._reject = reject
        self._metrics = metrics
        self._lock = threading.RLock()
        # Exceptions may strike between any two steps in here. Each entry is added and removed by one atomic step, so
        # none is miscounted, and ``stand`` repairs what was left half done. All are guarded by _lock, except removals
        # from ``calls``, which the server thread makes.
        self.calls: dict[Call, None] = {}
        self._inside: dict[Call, None] = {}
        self._of_client: dict[str, dict[Call, None]] = {}
        self._lines: dict[str, OrderedDict[Call, Wake]] = {}  # waiting calls by client; no line is empty
        self._ready: OrderedDict[str, None] = OrderedDict()  # clients with a line and room within their limit, in turns
        self._closed: Callable[[], LMBridgeError] | None = None

    @property
    def pending(self) -> int:
        """How many calls hold a place."""
        return len(self._inside)

    @property
    def empty(self) -> bool:
        """Whether no call holds or awaits a place."""
        return not self._inside and not self._lines

    def inside(self) -> list[Call]:
        """The calls that hold a place."""
        return list(self._inside)

    # --- the caller's end ---

    def enter(self, call: Call, patient: bool = False) -> bool:
        """Register a new call and give it a place if there is one; False: it must wait in line.

        Args:
            patient: the caller has answers to wait for, so it waits in line even if the bridge rejects.

        Raises:
            QueueFullError: there is none, and the bridge has ``when_full="reject"``; the call is not registered.
            BridgeClosedError: the server has ended; the call is not registered.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed()
            if call.outcomes:  # abandoned before it was sent; it may already have been removed
                return True
            self.calls[call] = None  # no function call between this and the count, so no exception either
            self._metrics.started += 1
            if self._try_enter(call):
                return True
            if patient or not self._reject:
                return False
            del self.calls[call]
            self._metrics.outcomes[REFUSED] += 1  # the server never sees it
        raise QueueFullError(
            f"{self.pending} requests are already waiting, and one client may have {self._max_per_client} of them; "
            "this one was refused. Try again later."
        ).hinted(
            f"max_pending={self._max_pending} and max_pending_per_client={self._max_per_client} are the limits; "
            "when_full='block' waits for room."
        )

    def stand(self, call: Call, wake: Wake) -> bool:
        """Wait in line for a place; True once the call has one. Ask again once a second.

        Args:
            wake: called, by any thread, once the call has a place.
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
        """Whether a call is admitted or still in line. Takes no lock."""
        line = self._lines.get(call.request.client)
        return call.admitted or self._closed is not None or (line is not None and call in line)

    def forget(self, call: Call) -> None:
        """Remove an ended call from the line or its place; idempotent. Any thread."""
        with self._lock:
            wake = self._step_out(call)
        self.leave(call)
        if wake is not None:
            wake()

    # --- the loop end ---

    def leave(self, call: Call) -> None:
        """Free the call's place; idempotent. Any thread."""
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
        """Refuse every call with ``error()``, return the registered calls, and wake those waiting here."""
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
        """Let a waiting client with room within its limit take turns."""
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
        """Give free places to waiting calls, clients in turns."""
        while self._ready and len(self._inside) < self._max_pending:
            client, _ = self._ready.popitem(last=False)
            line = self._lines.get(client)
            if not line:
                continue
            call = next(iter(line))
            wake = line[call]
            gone = call.admitted or bool(call.outcomes)  # interrupted half way, or ended while waiting
            if gone or self._try_enter(call):
                self._step_out(call)
                wake()
            self._line_up(client)
