"""The caller's end for an asyncio loop other than the server's.

Rule: an ``OtherLoop`` belongs to one loop and is used there only. All calls of that loop share its channel, and the
server wakes the loop at most once for all of them; nothing here blocks.
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
    """One foreign loop's channel, and who waits there for news of which call."""

    def __init__(self, server: ServerHandle, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self.readers: dict[Call, list[News]] = {}
        self._look: asyncio.TimerHandle | None = None  # there while somebody waits
        self._bell = Doorbell(self._answer, loop)
        self.channel: Channel[Call] = Channel(self._bell)
        server.channels.register(self.channel)

    # --- sending ---

    async def send(self, call: Call) -> None:
        """Have a new call admitted and send it; waits while the gate is full, at most to the call's deadline.

        A call that ends before it was sent has an outcome afterwards.

        Raises:
            QueueFullError: there is no place, and the bridge does not wait for one.
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
        except QueueFullError as error:  # it is in no book
            call.settle(error)
            raise
        except BaseException as error:  # the task was cancelled
            call.settle(error if isinstance(error, LMBridgeError) else interrupted_error())
            server.abort(call)
            raise

    def abandon(self) -> None:
        """End the calls that somebody waited for here: the loop is closed. Any thread."""
        for call in list(self.readers):
            if call.settle(interrupted_error()):
                self._server.abort(call)

    # --- waiting ---

    def listen(self) -> News:
        """For a task that waits for news of some calls."""
        return News(self)

    async def wait(self, call: Call) -> None:
        """Return when there may be something to see on ``call``; settles it once its deadline has passed."""
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
        """Wake whoever waits for news of ``call``."""
        for news in list(self.readers.get(call, ())):
            news.tell(call)

    def look_after(self, call: Call, news: News) -> None:
        """Tell ``news`` of that call."""
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
        """Look by itself once a second, so that a wake-up that is lost costs no more."""
        self._look = None
        self._bell.answer()  # which lowers its flag too: a ringer may have been struck after raising it
        for call in list(self.readers):
            if call.outcomes or call.deltas or not self._server.gate.stays(call):
                self.tell(call)
        if self.readers:
            self._look = self._loop.call_later(SLICE, self._look_again)


class News:
    """What one task waits for: tokens that name any of its calls."""

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
        """There may be something to see on ``call``."""
        self._named.append(call)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout: float | None) -> list[Call]:
        """The calls that may have news, or none after ``timeout`` seconds."""
        if not self._named:
            self._waiter = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._waiter], timeout=timeout)
        named, self._named = self._named, []
        return named

    def close(self) -> None:
        """Wait for nothing more."""
        for call in self._calls:
            readers = self._port.readers.get(call)
            if readers is not None and self in readers:
                readers.remove(self)
                if not readers:
                    del self._port.readers[call]
