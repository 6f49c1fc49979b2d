"""What all callers of one bridge share.

Rule: any thread.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lmbridge.caller.dispatcher import Dispatcher
from lmbridge.caller.other_loop import OtherLoop
from lmbridge.crossing.handle import ServerHandle


class Reporting(Protocol):
    """In whose name somebody observes calls."""

    def report_all(self) -> None:
        """Tell the observer of all that has ended."""


class Access:
    """The way to the server, the default deadline, the dispatcher of futures, and a port for each other loop.

    Attributes:
        server: ``server(blocking)`` is the handle of the running server, which the first call starts; ``blocking`` says
            that the caller will wait, which the server thread must not.
        handle: the same, without a look at whether it runs; takes no lock.
        timeout: seconds, the deadline of calls that give none.
        untold: the accounts whose observers have not heard the end of all their calls; each step is atomic.
        reports: what observers are to be told on the thread for callbacks; any thread appends.
    """

    def __init__(self, server: Callable[[bool], ServerHandle], handle: ServerHandle, timeout: float | None) -> None:
        self.server = server
        self.handle = handle
        self.timeout = timeout
        self.untold: dict[Reporting, None] = {}
        self.reports: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # a signal handler may ask while its thread holds it
        self._dispatcher: Dispatcher | None = None  # guarded by _lock when written, as is the next
        self._ports: dict[asyncio.AbstractEventLoop, OtherLoop] = {}
        handle.helpers += [weakref.WeakMethod(self._see_to_reports), weakref.WeakMethod(self._see_to_loops)]

    def dispatcher(self) -> Dispatcher:
        """The dispatcher of futures; made when first needed, after the server has started."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    self._dispatcher = Dispatcher(self.handle)
        return self._dispatcher

    def close(self) -> None:
        """The bridge has been closed: tell observers of the calls that nobody has read to their ends."""
        for account in list(self.untold):
            account.report_all()

    def _see_to_reports(self) -> None:
        while self.reports:
            self.dispatcher().look_after()  # whose thread ends that of the callbacks
            self.dispatcher().callbacks.run_soon(self.reports.popleft())

    def _see_to_loops(self) -> None:
        """End what a loop has left behind that was closed in the midst of it."""
        for loop, port in list(self._ports.items()):
            if loop.is_closed():
                port.abandon()

    def port(self, loop: asyncio.AbstractEventLoop) -> OtherLoop:
        """The port of somebody else's loop; made when first needed."""
        port = self._ports.get(loop)
        if port is None:
            with self._lock:
                self._ports = {other: port for other, port in self._ports.items() if not other.is_closed()}
                port = self._ports[loop] = OtherLoop(self.handle, loop)
        return port
