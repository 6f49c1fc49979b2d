"""The fairness account that calls are made on, with its own pair of queues.

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
        name: identifies whose turn its calls take.
        access: the way to the server.
        closed: the error that ends its calls once it is closed.
    """

    __slots__ = ("name", "access", "closed", "observer", "_observed", "_own")

    def __init__(self, access: Access, name: str, observer: Observer | None = None) -> None:
        self.name = name
        self.access = access
        self.closed: LMBridgeError | None = None
        self.observer = observer
        self._observed: dict[Call, None] = {}  # observed calls that have not ended; each step is atomic
        # Its pair while no call uses it; append and pop are atomic. It is freed with the account: a finalizer returning
        # it would run after the garbage collector has cleared the server's weak reference.
        self._own: list[Channel[Call]] = []

    def server(self, blocking: bool) -> ServerHandle:
        """The running server.

        Raises:
            LMBridgeError: the bridge or this account is closed, or the thread or process may not call it.
        """
        server = self.access.server(blocking)
        if self.closed is not None:
            raise fresh(self.closed)
        return server

    def lease(self, server: ServerHandle) -> Channel[Call]:
        """A channel for one consumer: its own pair, or another if that is in use."""
        try:
            return self._own.pop()
        except IndexError:
            return server.channels.lease()

    def take_back(self, server: ServerHandle, channel: Channel[Call]) -> None:
        """Take back a channel whose calls have all ended."""
        if self._own or self.closed is not None:
            server.channels.give_back(channel)
        else:
            self._own.append(channel)

    def call(self, request: Request, channel: Channel[Call], streaming: bool = False) -> Call:
        """A new call on this account, not sent yet."""
        call = Call(request, channel, self, streaming)
        if self.observer is not None:
            self._observed[call] = None
            self.access.untold[self] = None
            self._tell(self.observer.begun, request)
            if self.closed is not None:  # close() may have missed this call
                call.settle(fresh(self.closed))
                self.report(call)
        return call

    def report(self, call: Call) -> None:
        """Tell the observer how a call ended; only the first report counts."""
        if self.observer is None or call not in self._observed or not call.outcomes:
            return
        try:
            del self._observed[call]
        except KeyError:  # already reported
            return
        self._tell(self.observer.ended, call.request, call.result())
        if not self._observed:
            self.access.untold.pop(self, None)
            if self._observed:  # a call may have begun meanwhile
                self.access.untold[self] = None

    def report_later(self, call: Call) -> None:
        """``report`` an abandoned call on the callback thread. Takes no lock: finalizers use it."""
        if call in self._observed:
            self.access.reports.append(functools.partial(self.report, call))

    def report_all(self) -> None:
        """Report every ended call to the observer."""
        for call in list(self._observed):
            self.report(call)

    def close(self, error: LMBridgeError | None = None) -> None:
        """End every call made on this account and refuse further ones."""
        if self.closed is None:
            self.closed = error or BridgeClosedError(
                f"The client {self.name!r} was closed; its requests were aborted. Create a new client."
            )
        handle = self.access.handle
        if handle.forked:
            return
        if self.observer is None or self._observed:  # an observed account knows whether it has open calls
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
