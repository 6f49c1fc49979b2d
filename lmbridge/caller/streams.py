"""A call whose answer is read while it grows.

Rule: everything here runs on the caller's end and looks only at the ``Call``. The server knows no stream, so one that
is dropped is finalized at once, and its finalizer aborts the call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from lmbridge.crossing.call import Call, timeout_error
from lmbridge.crossing.channel import Closed, Empty
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Delta, Response, join_deltas

if TYPE_CHECKING:
    from lmbridge.caller.other_loop import OtherLoop
    from lmbridge.server.server import Server


class _Reading:
    """What both kinds of stream share: they end once, are read once, and abort when they are left."""

    def __init__(self, server: Server, call: Call, owner: object) -> None:
        self._server = server
        self._call = call
        self._owner = owner  # keeps the bridge alive for as long as the stream is
        self._read: list[Delta] = []
        self._iterated = False
        self._turn = threading.Lock()  # held while somebody waits for the next delta

    @property
    def request_id(self) -> str:
        return self._call.request.id

    @property
    def response(self) -> Response:
        """The whole answer, with usage and timings; ``finish_reason`` is ``abort`` for a stream that was left.

        Raises:
            RuntimeError: the stream has not ended yet.
            LMBridgeError: the error it ended with.
        """
        if self._call.outcome is None:
            raise RuntimeError("The stream has not ended yet; read it to its end, or close it, before .response.")
        return self._call.response(self._read)

    def __repr__(self) -> str:
        outcome = self._call.outcome
        state = "open" if outcome is None else getattr(outcome, "finish_reason", type(outcome).__name__)
        return f"<{type(self).__name__} {self.request_id} {state}>"

    def __del__(self) -> None:
        # A finalizer may run in the middle of anything, with any lock held: it may only append to a deque and ring.
        if hasattr(self, "_read"):
            self._leave()

    def _leave(self, error: LMBridgeError | None = None) -> bool:
        """Abort unless the call has an outcome; takes no lock."""
        if self._call.outcome is not None or self._server.forked:
            return False
        if not self._call.settle(error or self._call.finish("abort")):
            return False
        self._server.abort(self._call)
        return True

    def _take(self) -> Delta | None:
        """All that came since the last take, merged; None when nothing did. One reader at a time."""
        call = self._call
        call.signalled = False  # before looking, so that what comes now sends a new token
        if not call.deltas:
            return None
        taken = call.deltas[:]
        del call.deltas[: len(taken)]
        delta = join_deltas(taken)
        self._read.append(delta)
        return delta

    def _begin(self) -> None:
        if self._iterated:
            raise RuntimeError("A stream can be iterated once; its whole answer is in .response.")
        self._iterated = True

    def _end(self) -> bool:
        """Whether the call has ended and everything was read; raises the error it ended with."""
        outcome = self._call.outcome
        if outcome is None or self._call.deltas:
            return False
        if isinstance(outcome, Response):
            return True
        raise self._call.error(outcome, self._read)

    def _remaining(self) -> float | None:
        """Seconds to the deadline; settles the call once it has passed."""
        deadline = self._call.request.deadline
        if deadline is None:
            return None
        remaining = deadline - time.monotonic()
        if remaining <= 0 and self._call.settle(timeout_error(self._call)):
            self._server.abort(self._call)
        return max(0.0, remaining)


class Stream(_Reading):
    """The deltas of one answer, as they come: ``for delta in stream``.

    Leaving the loop, ``close``, the end of a ``with`` and dropping the stream abort the generation. Deltas that come
    while nobody reads are merged into the next one.
    """

    def __init__(self, server: Server, call: Call, owner: object, release: Callable[[Call], None]) -> None:
        self._release: Callable[[Call], None] | None = release  # takes the call's channel back, once
        super().__init__(server, call, owner)

    def __iter__(self) -> Iterator[Delta]:
        self._begin()
        return self._iterate()

    def _iterate(self) -> Iterator[Delta]:
        # A generator of its own: only the for loop holds it, so that `break` drops it and this finally runs at once,
        # even while the Stream itself is held.
        try:
            while (delta := self._next()) is not None:
                yield delta
        finally:
            self._leave()

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            StopIteration: the answer is complete, or the stream was closed.
            RuntimeError: another thread waits for the next delta already.
            RequestTimeoutError: the deadline has passed; other LMBridgeErrors as they come.
        """
        delta = self._next()
        if delta is None:
            raise StopIteration
        return delta

    def wait(self, timeout: float | None = None) -> bool:
        """Block until ``next`` would not; False when ``timeout`` seconds passed first. For readers that have to say
        something in the meantime, such as an HTTP response that keeps its connection alive."""
        call = self._call
        limit = None if timeout is None else time.monotonic() + timeout
        self._take_turn()
        try:
            while True:
                call.signalled = False
                if call.deltas or call.outcomes:
                    return True
                left = None if limit is None else limit - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._wait(call, left)
        except BaseException:  # KeyboardInterrupt while waiting: nobody reads on
            self._leave()
            raise
        finally:
            self._turn.release()

    def _take_turn(self) -> None:
        if self._server.forked:
            self._server.check_process()
        if not self._turn.acquire(False):
            raise RuntimeError("Another thread is reading this stream; give each thread a stream of its own.")

    def _next(self) -> Delta | None:
        """The next delta; None at the end."""
        call = self._call
        self._take_turn()
        try:
            while True:
                if (delta := self._take()) is not None:
                    return delta
                if call.outcomes and self._end():
                    return None
                self._wait(call, None)
        except LMBridgeError:
            raise
        except BaseException:  # KeyboardInterrupt while waiting: nobody reads on
            self._leave()
            raise
        finally:
            if call.ended:
                self._give_back()
            self._turn.release()

    def close(self, error: LMBridgeError | None = None) -> None:
        """Abort the generation if it still runs; a reader in another thread sees the end. Any thread, any time.

        Args:
            error: raised to that reader instead, and what the request counts as having ended with.
        """
        if self._leave(error):
            self._call.channel.nudge(self._call)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _give_back(self) -> None:
        release = self._release
        if release is not None and not self._call.deltas:
            self._release = None
            release(self._call)

    def _wait(self, call: Call, limit: float | None) -> None:
        remaining = None if call.request.deadline is None else self._remaining()
        if call.outcomes:
            return
        if limit is not None and (remaining is None or limit < remaining):
            remaining = limit
        try:
            call.channel.wait(True, remaining)
        except Empty:
            pass
        except Closed:
            call.settle(self._server.closed_error())


class AsyncStream(_Reading):
    """``Stream`` for another event loop: ``async for delta in stream``. Cancelling the reading task aborts.

    Sending may have to wait for room in the queue, so it is done by the first delta asked for, or by awaiting the
    stream, which gives the stream itself.
    """

    def __init__(self, server: Server, call: Call, owner: object, port: OtherLoop) -> None:
        self._port = port
        self._sent = False
        super().__init__(server, call, owner)

    def __await__(self) -> Generator[Any, None, AsyncStream]:
        yield from self._send().__await__()
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
            await self._send()
            while True:
                if (delta := self._take()) is not None:
                    return delta
                if self._end():
                    raise StopAsyncIteration
                await self._port.wait(self._call, self._remaining())
        except (StopAsyncIteration, LMBridgeError):
            raise
        except BaseException:  # the reading task was cancelled
            self._leave()
            raise
        finally:
            self._turn.release()

    async def whole(self) -> Response:
        """Read to the end and return the whole answer."""
        try:
            await self._send()
            while self._call.outcome is None:
                self._call.signalled = False
                await self._port.wait(self._call, self._remaining())
        except BaseException:
            self._leave()
            raise
        return self._call.response(self._read)

    async def _send(self) -> None:
        """Enter the gate and send, once.

        Raises:
            RequestTimeoutError: the deadline passed at the gate.
            QueueFullError: there is no room, and the bridge does not wait for it.
        """
        if self._sent:
            return
        self._sent = True
        try:
            if not await self._server.gate.enter_async(self._call):
                raise timeout_error(self._call)
            self._server.submit(self._call)
        except LMBridgeError as error:
            self._call.settle(error)
            raise

    async def aclose(self) -> None:
        """Abort the generation if it still runs."""
        if self._leave():
            self._port.tell(self._call)

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
        self._stream._leave()
