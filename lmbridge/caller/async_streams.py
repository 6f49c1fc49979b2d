"""A call whose answer is read by a task on another event loop while it grows.

Rule: the caller's end; nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Any

from lmbridge.caller.account import Account
from lmbridge.caller.other_loop import OtherLoop
from lmbridge.caller.streams import Reading, drop
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Delta, Request, Response


class AsyncStream(Reading):
    """``Stream`` for another event loop: ``async for delta in stream``. Cancelling the reading task aborts.

    Sending may have to wait for room in the queue, so it is done by the first delta asked for, or by awaiting the
    stream, which gives the stream itself. Each delta may be awaited on another loop than the one before.
    """

    def __init__(self, account: Account, request: Request, owner: object, streaming: bool = True) -> None:
        server = account.server(False)
        self._sent = False
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "astream() serves a task: call it where an event loop runs, in a coroutine. Threads take stream()."
            ) from None
        port = account.access.port(loop)
        super().__init__(account, server, account.call(request, port.channel, streaming), owner)

    def __await__(self) -> Generator[Any, None, AsyncStream]:
        yield from self._send(self._here()).__await__()
        return self

    def __aiter__(self) -> AsyncIterator[Delta]:
        self._begin()
        return _AsyncIteration(self)

    async def __anext__(self) -> Delta:
        """The next delta; raises StopAsyncIteration at the end, and otherwise what ``Stream.__next__`` raises."""
        self._server.check_process()
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("Another task is reading this stream; give each task a stream of its own.")
        try:
            port = self._here()
            await self._send(port)
            while True:
                if (delta := self._call.take()) is not None:
                    return delta
                if self._end():
                    raise StopAsyncIteration
                await port.wait(self._call)
        except (StopAsyncIteration, LMBridgeError):
            raise
        except BaseException:  # the reading task was cancelled
            self._leave()
            raise
        finally:
            self._turn.release()

    async def whole(self) -> Response:
        """Read to the end and return the whole answer. Several tasks may wait for it."""
        try:
            port = self._here()
            await self._send(port)
            while self._call.outcome is None:
                self._call.signalled = False
                await port.wait(self._call)
        except BaseException:
            self._leave()
            raise
        finally:
            self._account.report(self._call)
        return self._call.response()

    def _here(self) -> OtherLoop:
        """The port of the loop that runs now, where the call's tokens go from now on."""
        port = self._account.access.port(asyncio.get_running_loop())
        if self._call.channel is not port.channel:
            self._call.channel = port.channel
        return port

    async def _send(self, port: OtherLoop) -> None:
        """Enter the gate and send, once.

        Raises:
            QueueFullError: there is no room, and the bridge does not wait for it.
        """
        if not self._sent:
            self._sent = True
            await port.send(self._call)

    async def aclose(self) -> None:
        """Abort the generation if it still runs."""
        if self._leave():
            self._call.channel.nudge(self._call)
        self._account.report(self._call)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.aclose()


class _AsyncIteration:
    """What ``async for`` holds: its end, by ``break`` too, aborts even while the stream itself is held."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> _AsyncIteration:
        return self

    async def __anext__(self) -> Delta:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        drop(self._stream._leave)
