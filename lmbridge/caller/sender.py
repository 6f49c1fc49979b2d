"""Sends a list of requests one after another, as room allows.

Rule: the caller's end, one reader; it never blocks. While answers are still to come, a request for which there is no
place stands in line rather than being refused: so lists of any length flow through.
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
    """The requests that wait to be sent, and the calls whose answers are still to come.

    Attributes:
        open: the calls that were made and not closed, each with the position of its request.
        opened: called with each call that is made.
    """

    def __init__(self, account: Account, server: ServerHandle, channel: Channel[Call], streaming: bool = False) -> None:
        self.open: dict[Call, int] = {}
        self.opened: Callable[[Call], None] = lambda call: None
        self._account = account
        self._server = server
        self._channel = channel
        self._streaming = streaming
        self._waiting: deque[tuple[int, Request]] = deque()
        self.left: tuple[LMBridgeError | None] | None = None  # set once by any thread: all end, with that error
        self._stopped: set[int] = set()  # positions that were stopped; any thread adds
        self._deadline: float | None = None
        self._ended: list[Call] = []  # without having been sent; no token will name them
        self._begun = False  # something was sent, or tried to
        self._standing: Call | None = None  # in line at the gate; is in ``open`` too

    def add(self, index: int, request: Request) -> None:
        """Have a request sent when its turn comes. All share one deadline."""
        self._deadline = request.deadline
        self._waiting.append((index, request))

    @property
    def done(self) -> bool:
        """Whether everything was sent and has been closed."""
        return not self.open and not self._waiting

    def send(self) -> None:
        """Send what there is room for. What ends without being sent stays in ``open``; ``ended`` names it.

        Raises:
            LMBridgeError: nothing could be sent: there is no room and the bridge does not wait, or it is closed.
        """
        if self._standing is not None and not self._let_in(self._standing):
            return
        while self._waiting:
            index, request = self._waiting[0]
            first, self._begun = not self._begun, True
            call = self._account.call(request, self._channel, self._streaming)
            call.kept = True  # whoever reads the others may take his time before he sends it
            self.open[call] = index  # first, so that it will be aborted whatever happens next
            self._waiting.popleft()
            self.opened(call)
            if self._is_over(call, index):
                self._ended.append(call)
            elif not self._enter(call, first):
                return

    def ended(self) -> list[Call]:
        """The calls that have ended without being sent, since this was asked last."""
        ended, self._ended = self._ended, []
        return ended

    def remaining(self) -> float:
        """Seconds to wait before looking at all of them again; settles them once their deadline has passed."""
        if self._deadline is None:
            return SLICE
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            for call in self.open:
                self._server.expire(call)
        return min(max(remaining, 0.0), SLICE)

    def stop(self, index: int) -> None:
        """End the call at that position as one that was left, also where it was not sent yet. Any thread."""
        self._stopped.add(index)  # first: it may be opened at this moment
        for call, place in list(self.open.items()):
            if place == index and call.settle(call.finish("abort")):
                self._server.abort(call)

    def abort(self, error: LMBridgeError | None = None) -> list[Call]:
        """End all of them, as left or with a copy of ``error``; takes no lock. Returns the open ones that it ended."""
        if self.left is None:
            self.left = (error,)
        ended = []
        for call in list(self.open):
            if not call.outcomes and call.settle(self._end(call)):
                self._server.abort(call)
                ended.append(call)
        return ended

    def unsent(self, request: Request) -> Outcome:
        """What a request ends with that was not sent before all of them were left."""
        return self._end(Call(request, self._channel, self._account))

    def _end(self, call: Call) -> Outcome:
        error = self.left[0] if self.left is not None else None
        return call.finish("abort") if error is None else fresh(error)

    def _is_over(self, call: Call, index: int) -> bool:
        """Whether a call has ended before it was sent: it was left or stopped."""
        if self.left is not None or index in self._stopped:
            call.settle(self._end(call))
        return bool(call.outcomes)

    def _enter(self, call: Call, first: bool) -> bool:
        """Whether a call is through the gate, or has ended there; False when it stands in line."""
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
        """Whether the call in line has been given a place, or has ended there."""
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
        if call.outcomes:  # it was left meanwhile
            self._ended.append(call)
        else:
            self._server.submit(call)
