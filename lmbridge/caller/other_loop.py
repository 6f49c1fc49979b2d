"""The caller's end for an asyncio loop other than the server's.

Rule: a ``OtherLoop`` belongs to one loop and is used there only. All calls of that loop share its channel, and the
server wakes the loop at most once for all of them; nothing here blocks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.crossing.doorbell import Doorbell

if TYPE_CHECKING:
    from lmbridge.server.server import Server


class OtherLoop:
    """One foreign loop's channel, and the tasks there that wait for tokens."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._waiting: dict[Call, asyncio.Future[None]] = {}
        self.channel = Channel(Doorbell(loop, self._answer))
        server.register(self.channel)

    async def wait(self, call: Call, timeout: float | None) -> None:
        """Return when there may be something to see on ``call``, or after ``timeout`` seconds."""
        if call.outcome is not None:
            return
        future = self._waiting[call] = self._loop.create_future()
        try:
            await asyncio.wait([future], timeout=timeout)
        finally:
            self._waiting.pop(call, None)

    def tell(self, call: Call) -> None:
        """Wake the task that waits on ``call``."""
        future = self._waiting.pop(call, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _answer(self) -> None:
        try:
            while True:
                self.tell(self.channel.wait(False))
        except Empty:
            pass
        except Closed:
            for call in list(self._waiting):
                call.settle(self._server.closed_error())
                self.tell(call)
