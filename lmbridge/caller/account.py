"""In whose name calls are made: a fairness account with its own pair of queues.

Rule: any thread but the server's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from lmbridge.caller.access import Access
from lmbridge.caller.observer import Observer
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import BridgeClosedError, LMBridgeError, fresh
from lmbridge.log import logger
from lmbridge.messages import Request


class Account:
    """A client's, a thread's or a task's account.

    Its pair serves one call at a time; nested and concurrent calls borrow others.

    Attributes:
        name: whose turn its calls take.
        access: to the server.
        closed: what its calls end with once it is closed.
    """

    __slots__ = ("name", "access", "closed", "observer", "_observed", "_own")

    def __init__(self, access: Access, name: str, observer: Observer | None = None) -> None:
        self.name = name
        self.access = access
        self.closed: LMBridgeError | None = None
        self.observer = observer
        self._observed: dict[Call, None] = {}  # begun and not ended, where somebody hears of it; each step is atomic
        # Its pair while no call uses it; append and pop are atomic. It goes with the account: a finalizer that gave it
        # back would run after the garbage collector has cut the server's weak reference to it.
        self._own: list[Channel[Call]] = []

    def server(self, blocking: bool) -> ServerHandle:
        """The running server.

        Raises:
            LMBridgeError: the bridge or this account is closed, or this is the wrong thread or process to ask in.
        """
        server = self.access.server(blocking)
        if self.closed is not None:
            raise fresh(self.closed)
        return server

    def lease(self, server: ServerHandle) -> Channel[Call]:
        """A channel for one consumer: its own pair, or another where that is in use."""
        try:
            return self._own.pop()
        except IndexError:
            return server.channels.lease()

    def take_back(self, server: ServerHandle, channel: Channel[Call]) -> None:
        """Take a channel back all of whose calls have had the final word."""
        if self._own or self.closed is not None:
            server.channels.give_back(channel)
        else:
            self._own.append(channel)

    def call(self, request: Request, channel: Channel[Call], streaming: bool = False) -> Call:
        """A new call in this account's name; not sent yet."""
        call = Call(request, channel, self, streaming)
        if self.observer is not None:
            self._observed[call] = None
            self.access.untold[self] = None
            self._tell(self.observer.begun, request)
            if self.closed is not None:  # close() may have looked before this one was there
                call.settle(fresh(self.closed))
                self.report(call)
        return call

    def report(self, call: Call) -> None:
        """Tell whoever observes how a call has ended; the first time counts."""
        if self.observer is None or call not in self._observed or not call.outcomes:
            return
        try:
            del self._observed[call]
        except KeyError:  # another was faster
            return
        self._tell(self.observer.ended, call.request, call.result())
        if not self._observed:
            self.access.untold.pop(self, None)
            if self._observed:  # only now
                self.access.untold[self] = None

    def report_later(self, call: Call) -> None:
        """``report`` on the thread for callbacks, for one that was left. Takes no lock: finalizers use it."""
        if call in self._observed:
            self.access.reports.append(functools.partial(self.report, call))

    def report_all(self) -> None:
        """Tell whoever observes of all that has ended."""
        for call in list(self._observed):
            self.report(call)

    def close(self, error: LMBridgeError | None = None) -> None:
        """End every call that was made in this account's name, wherever it is, and refuse the next."""
        if self.closed is None:
            self.closed = error or BridgeClosedError(
                f"The client {self.name!r} was closed; its requests were aborted. Make a new one."
            )
        handle = self.access.handle
        if handle.forked:
            return
        if self.observer is None or self._observed:  # an observed account knows whether it has any
            handle.abort_where(lambda call: call.owner is self, self.closed)
        for call in list(self._observed):
            call.settle(fresh(self.closed))
            self.report(call)
        while self._own:
            handle.channels.give_back(self._own.pop())

    def _tell(self, hears: Callable[..., None], *told: object) -> None:
        try:
            hears(*told)
        except (Exception, SystemExit):
            logger.exception("The observer of client %s failed.", self.name)
