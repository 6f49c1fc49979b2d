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
    """An account with an observer."""

    def report_all(self) -> None:
        """Report every ended call to the observer."""


class Access:
    """The way to the server, the default deadline, the dispatcher of futures, and a port for each foreign event loop.

    Attributes:
        server: ``server(blocking)`` returns the running server's handle; the first call starts the server. ``blocking``
            says that the caller will wait, which the server thread must not.
        handle: the same without checking that the server runs; takes no lock.
        timeout: default deadline, in seconds.
        untold: accounts whose observers have not been told of every ended call; each step is atomic.
        reports: observer notifications for the callback thread; any thread appends.
    """

    def __init__(self, server: Callable[[bool], ServerHandle], handle: ServerHandle, timeout: float | None) -> None:
        self.server = server
        self.handle = handle
        self.timeout = timeout
        self.untold: dict[Reporting, None] = {}
        self.reports: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # a signal handler may need it while its thread holds it
        self._dispatcher: Dispatcher | None = None  # guarded by _lock when written, as is the next
        self._ports: dict[asyncio.AbstractEventLoop, OtherLoop] = {}
        handle.helpers += [weakref.WeakMethod(self._see_to_reports), weakref.WeakMethod(self._see_to_loops)]

    def dispatcher(self) -> Dispatcher:
        """The dispatcher of futures; created on first use, after the server has started."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    self._dispatcher = Dispatcher(self.handle)
        return self._dispatcher

    def close(self) -> None:
        """After the bridge has closed: notify observers of the calls that nobody has read to the end."""
        for account in list(self.untold):
            account.report_all()

    def _see_to_reports(self) -> None:
        while self.reports:
            self.dispatcher().look_after()  # its thread ends the callback thread
            self.dispatcher().callbacks.run_soon(self.reports.popleft())

    def _see_to_loops(self) -> None:
        """End the calls of event loops that were closed while calls ran."""
        for loop, port in list(self._ports.items()):
            if loop.is_closed():
                port.abandon()

    def port(self, loop: asyncio.AbstractEventLoop) -> OtherLoop:
        """The port of a foreign event loop; created on first use."""
        port = self._ports.get(loop)
        if port is None:
            with self._lock:
                self._ports = {other: port for other, port in self._ports.items() if not other.is_closed()}
                port = self._ports[loop] = OtherLoop(self.handle, loop)
        return port
