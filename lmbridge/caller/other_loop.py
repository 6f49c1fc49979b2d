"""The caller's end for an asyncio loop other than the server's.

Rule: an ``OtherLoop`` belongs to one loop and is used only there. All calls of that loop share its channel, and the
server wakes the loop at most once for all of them. Nothing here blocks.
"""

from __future__ import annotations

import asyncio

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE, Channel, Closed, Empty
from lmbridge.crossing.doorbell import Doorbell
from lmbridge.crossing.endings import interrupted_error
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import LMBridgeError, QueueFullError


class OtherLoop:
    """A foreign loop's channel, and which task waits there for which call."""

    def __init__(self, server: ServerHandle, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self.readers: dict[Call, list[News]] = {}
        self._look: asyncio.TimerHandle | None = None  # set while a task waits
        self._bell = Doorbell(self._answer, loop)
        self.channel: Channel[Call] = Channel(self._bell)
        server.channels.register(self.channel)

    # --- sending ---

    async def send(self, call: Call) -> None:
        """Have a new call admitted and send it; waits while the gate is full, at most until the call's deadline.

        A call that ends before it is sent then has an outcome.

        Raises:
            QueueFullError: there is no room, and the bridge rejects.
            LMBridgeError: the bridge or the client is closed.
        """
        server = self._server
        call.channel = self.channel
        try:
            if not server.gate.enter(call):
                server.check_owner(call)
                while not server.gate.stand(call, lambda: call.channel.nudge(call)) and not call.outcomes:
                    await self.wait(call)
            server.check_owner(call)
            if not call.outcomes:
                server.submit(call)
        except QueueFullError as error:  # a refused call is not registered
            call.settle(error)
            raise
        except BaseException as error:  # the task was cancelled
            call.settle(error if isinstance(error, LMBridgeError) else interrupted_error())
            server.abort(call)
            raise

    def abandon(self) -> None:
        """End the calls awaited here: the loop is closed. Any thread."""
        for call in list(self.readers):
            if call.settle(interrupted_error()):
                self._server.abort(call)

    # --- waiting ---

    def listen(self) -> News:
        """A News object for a task waiting for several calls."""
        return News(self)

    async def wait(self, call: Call) -> None:
        """Return when ``call`` may have news; settles it once its deadline has passed."""
        remaining = self._server.remaining(call)
        if call.outcomes:
            return
        news = self.listen()
        news.add(call)
        try:
            await news.wait(SLICE if remaining is None and call.request.deadline is not None else remaining)
        finally:
            news.close()

    def tell(self, call: Call) -> None:
        """Wake the task waiting for ``call``."""
        for news in list(self.readers.get(call, ())):
            news.tell(call)

    def look_after(self, call: Call, news: News) -> None:
        """Let ``news`` hear of ``call``."""
        self.readers.setdefault(call, []).append(news)
        if self._look is None:
            self._look = self._loop.call_later(SLICE, self._look_again)

    def _answer(self) -> None:
        try:
            while True:
                self.tell(self.channel.wait(False))
        except Empty:
            pass
        except Closed:
            for call in list(self.readers):
                call.settle(self._server.closed_error())
                self.tell(call)

    def _look_again(self) -> None:
        """Look again once a second, so that a lost wake-up costs no more than that."""
        self._look = None
        self._bell.answer()  # also lowers a flag whose ringer was interrupted
        for call in list(self.readers):
            if call.outcomes or call.deltas or not self._server.gate.stays(call):
                self.tell(call)
        if self.readers:
            self._look = self._loop.call_later(SLICE, self._look_again)


class News:
    """Waits for tokens that name any of one task's calls."""

    def __init__(self, port: OtherLoop) -> None:
        self._port = port
        self._calls: list[Call] = []
        self._named: list[Call] = []
        self._waiter: asyncio.Future[None] | None = None

    def add(self, call: Call) -> None:
        """Wait for news of this call too."""
        self._calls.append(call)
        self._port.look_after(call, self)

    def tell(self, call: Call) -> None:
        """``call`` may have news."""
        self._named.append(call)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout: float | None) -> list[Call]:
        """Wait up to ``timeout`` seconds; the calls that may have news."""
        if not self._named:
            self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._waiter], timeout=timeout)
        named, self._named = self._named, []
        return named

    def close(self) -> None:
        """Stop listening."""
        for call in self._calls:
            readers = self._port.readers.get(call)
            if readers is not None and self in readers:
                readers.remove(self)
                if not readers:
                    del self._port.readers[call]
