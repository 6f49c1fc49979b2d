"""An answer read by a task on another event loop as it grows.

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

    Sending may wait for room in the queue, so it happens when the first delta is requested or the stream is awaited,
    which returns the stream itself. Each delta may be awaited on a different loop.
    """

    def __init__(self, account: Account, request: Request, owner: object, streaming: bool = True) -> None:
        server = account.server(False)
        self._sent = False
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "astream() needs a running event loop: call it in a coroutine, or use stream() in a thread."
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
        """The next delta; raises StopAsyncIteration at the end, otherwise as ``Stream.__next__``."""
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
        """Read to the end and return the complete answer. Several tasks may wait for it."""
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
        """The running loop's port; from now on the call's tokens go there."""
        port = self._account.access.port(asyncio.get_running_loop())
        if self._call.channel is not port.channel:
            self._call.channel = port.channel
        return port

    async def _send(self, port: OtherLoop) -> None:
        """Enter the gate and send, once.

        Raises:
            QueueFullError: there is no room, and the bridge rejects.
        """
        if not self._sent:
            self._sent = True
            await port.send(self._call)

    async def aclose(self) -> None:
        """Abort generation if it is still running."""
        if self._leave():
            self._call.channel.nudge(self._call)
        self._account.report(self._call)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.aclose()


class _AsyncIteration:
    """The iterator of ``async for``: ending the loop aborts even while the stream is referenced elsewhere."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> _AsyncIteration:
        return self

    async def __anext__(self) -> Delta:
        return await self._stream.__anext__()

    def __del__(self) -> None:
        drop(self._stream._leave)
