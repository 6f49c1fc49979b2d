"""Sends a list of requests one after another, as room allows.

Rule: the caller's end, one reader; it never blocks. While answers are outstanding, a request without room waits in line
instead of being refused, so lists of any length flow through.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lmbridge.caller.account import Account
from lmbridge.caller.answer import give_up
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE, Channel
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import LMBridgeError, fresh
from lmbridge.messages import Outcome, Request


class Sender:
    """The requests still to send, and the calls still to be answered.

    Attributes:
        open: the calls made and not closed, each with the position of its request.
        opened: called with each new call.
    """

    def __init__(self, account: Account, server: ServerHandle, channel: Channel[Call], streaming: bool = False) -> None:
        self.open: dict[Call, int] = {}
        self.opened: Callable[[Call], None] = lambda call: None
        self._account = account
        self._server = server
        self._channel = channel
        self._streaming = streaming
        self._waiting: deque[tuple[int, Request]] = deque()
        self.left: tuple[LMBridgeError | None] | None = None  # set once by any thread: all calls end with that error
        self._stopped: set[int] = set()  # positions that were stopped; any thread adds
        self._deadline: float | None = None
        self._ended: list[Call] = []  # ended before being sent; no token will name them
        self._begun = False  # sending has been tried
        self._standing: Call | None = None  # waiting in line at the gate; also in ``open``

    def add(self, index: int, request: Request) -> None:
        """Queue a request for sending. All share one deadline."""
        self._deadline = request.deadline
        self._waiting.append((index, request))

    @property
    def done(self) -> bool:
        """Whether everything was sent and closed."""
        return not self.open and not self._waiting

    def send(self) -> None:
        """Send what there is room for. Calls that end unsent stay in ``open``; ``ended`` returns them.

        Raises:
            LMBridgeError: nothing could be sent: there is no room and the bridge rejects, or it is closed.
        """
        if self._standing is not None and not self._let_in(self._standing):
            return
        while self._waiting:
            index, request = self._waiting[0]
            first, self._begun = not self._begun, True
            call = self._account.call(request, self._channel, self._streaming)
            call.kept = True  # the reader of the others may be slow to send it
            self.open[call] = index  # first, so that it is aborted whatever happens next
            self._waiting.popleft()
            self.opened(call)
            if self._is_over(call, index):
                self._ended.append(call)
            elif not self._enter(call, first):
                return

    def ended(self) -> list[Call]:
        """The calls that ended unsent since the last query."""
        ended, self._ended = self._ended, []
        return ended

    def remaining(self) -> float:
        """Seconds until all calls need checking again; settles them once their deadline has passed."""
        if self._deadline is None:
            return SLICE
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            for call in self.open:
                self._server.expire(call)
        return min(max(remaining, 0.0), SLICE)

    def stop(self, index: int) -> None:
        """End the call at that position as abandoned, even if not sent yet. Any thread."""
        self._stopped.add(index)  # first: it may be opening right now
        for call, place in list(self.open.items()):
            if place == index and call.settle(call.finish("abort")):
                self._server.abort(call)

    def abort(self, error: LMBridgeError | None = None) -> list[Call]:
        """End all calls, as abandoned or with a copy of ``error``, and return those ended. Takes no lock."""
        if self.left is None:
            self.left = (error,)
        ended = []
        for call in list(self.open):
            if not call.outcomes and call.settle(self._end(call)):
                self._server.abort(call)
                ended.append(call)
        return ended

    def unsent(self, request: Request) -> Outcome:
        """The outcome of a request not sent before all were abandoned."""
        return self._end(Call(request, self._channel, self._account))

    def _end(self, call: Call) -> Outcome:
        error = self.left[0] if self.left is not None else None
        return call.finish("abort") if error is None else fresh(error)

    def _is_over(self, call: Call, index: int) -> bool:
        """Whether a call ended before it was sent: abandoned or stopped."""
        if self.left is not None or index in self._stopped:
            call.settle(self._end(call))
        return bool(call.outcomes)

    def _enter(self, call: Call, first: bool) -> bool:
        """Whether a call passed the gate or ended there; False while it waits in line."""
        try:
            if not self._server.gate.enter(call, patient=not first):
                self._server.check_owner(call)
                self._standing = call
                return self._let_in(call)
            self._submit(call)
        except BaseException as error:
            give_up(self._server, call, error)
            if first or not isinstance(error, LMBridgeError):
                raise
            self._ended.append(call)
        return True

    def _let_in(self, call: Call) -> bool:
        """Whether the call in line was admitted or has ended there."""
        if not self._server.gate.stand(call, lambda: self._channel.nudge(call)) and not call.outcomes:
            return False
        self._standing = None
        if call.outcomes:
            self._ended.append(call)
            return True
        try:
            self._submit(call)
        except BaseException as error:
            give_up(self._server, call, error)
            if not isinstance(error, LMBridgeError):
                raise
            self._ended.append(call)
        return True

    def _submit(self, call: Call) -> None:
        self._server.check_owner(call)
        if call.outcomes:  # abandoned meanwhile
            self._ended.append(call)
        else:
            self._server.submit(call)
