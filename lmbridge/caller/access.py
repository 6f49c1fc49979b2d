"""What all callers of one bridge share.

Rule: any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from lmbridge.caller.dispatcher import Dispatcher
from lmbridge.caller.other_loop import OtherLoop
from lmbridge.crossing.handle import ServerHandle


class Access:
    """The way to the server, the default deadline, the dispatcher of futures, and a port for each other loop.

    Attributes:
        server: ``server(blocking)`` is the handle of the running server, which the first call starts; ``blocking`` says
            that the caller will wait, which the server thread must not.
        handle: the same, without a look at whether it runs; takes no lock.
        timeout: seconds, the deadline of calls that give none.
    """

    def __init__(self, server: Callable[[bool], ServerHandle], handle: ServerHandle, timeout: float | None) -> None:
        self.server = server
        self.handle = handle
        self.timeout = timeout
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None  # guarded by _lock when written, as is the next
        self._ports: dict[asyncio.AbstractEventLoop, OtherLoop] = {}

    def dispatcher(self) -> Dispatcher:
        """The dispatcher of futures; made when first needed, after the server has started."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    self._dispatcher = Dispatcher(self.handle)
        return self._dispatcher

    def port(self, loop: asyncio.AbstractEventLoop) -> OtherLoop:
        """The port of somebody else's loop; made when first needed."""
        port = self._ports.get(loop)
        if port is None:
            with self._lock:
                self._ports = {other: port for other, port in self._ports.items() if not other.is_closed()}
                port = self._ports[loop] = OtherLoop(self.handle, loop)
        return port
