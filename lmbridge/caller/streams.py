"""An answer read by a thread as it grows.

Rule: the caller's end; it looks only at the ``Call``. The server holds no stream, so a dropped stream is finalized at
once, and its finalizer aborts the call.
"""

from __future__ import annotations

import threading
import time
from _thread import get_ident
from collections.abc import Callable, Iterator

from lmbridge.caller.account import Account
from lmbridge.caller.answer import send
from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE, Closed, Empty
from lmbridge.crossing.handle import ServerHandle
from lmbridge.errors import LMBridgeError, fresh
from lmbridge.messages import Delta, Request, Response


def drop(leave: Callable[[], object]) -> None:
    """Leave in a finalizer, where Python swallows thrown-in exceptions: the abort must still happen."""
    try:
        leave()
    except BaseException:
        leave()
        raise


class Reading:
    """Shared by both kinds of stream: they end once, are read once, and abort when abandoned."""

    def __init__(self, account: Account, server: ServerHandle, call: Call, owner: object) -> None:
        self._account = account
        self._server = server
        self._call = call
        self._owner = owner  # keeps the bridge alive as long as the stream
        self._iterated = False
        self._turn = threading.Lock()  # held by the reader waiting for the next delta

    @property
    def request_id(self) -> str:
        return self._call.request.id

    @property
    def response(self) -> Response:
        """The complete answer, with usage and timings; ``finish_reason`` is ``abort`` for an abandoned stream.

        Raises:
            RuntimeError: the stream has not ended yet.
            LMBridgeError: the error it ended with.
        """
        if self._call.outcome is None:
            raise RuntimeError("The stream has not ended yet: read it to the end or close it before using .response.")
        return self._call.response()

    def __repr__(self) -> str:
        outcome = self._call.outcome
        state = "open" if outcome is None else getattr(outcome, "finish_reason", type(outcome).__name__)
        return f"<{type(self).__name__} {self.request_id} {state}>"

    def __del__(self) -> None:
        # A finalizer may run at any point, with any lock held: it may only append to a deque and ring.
        if hasattr(self, "_turn"):
            drop(self._leave)
            self._account.report_later(self._call)

    def _leave(self, error: LMBridgeError | None = None) -> bool:
        """Abort unless the call has an outcome; takes no lock."""
        if self._call.outcome is not None or self._server.forked:
            return False
        if not self._call.settle(self._call.finish("abort") if error is None else fresh(error)):
            return False
        self._server.abort(self._call)
        self._account.report_later(self._call)
        return True

    def _begin(self) -> None:
        if self._iterated:
            raise RuntimeError("A stream can be iterated only once; its complete answer is in .response.")
        self._iterated = True

    def _end(self) -> bool:
        """Whether the call has ended and everything was read; raises its error."""
        outcome = self._call.outcome
        if outcome is None or self._call.deltas:
            return False
        self._account.report(self._call)
        if isinstance(outcome, Response):
            return True
        raise self._call.error(outcome)


class Stream(Reading):
    """The deltas of one answer, as they come: ``for delta in stream``.

    Leaving the loop, ``close``, leaving a ``with`` block and dropping the stream abort generation. Deltas that arrive
    while nobody reads are merged into the next one.
    """

    def __init__(self, account: Account, request: Request, owner: object) -> None:
        """Send the request; raises if it is invalid."""
        server = account.server(True)
        super().__init__(account, server, account.call(request, account.lease(server), streaming=True), owner)
        self._lent = True  # the call's channel must be returned
        try:
            if not send(server, self._call):
                self._end()
        except BaseException:
            account.report(self._call)
            raise

    def __iter__(self) -> Iterator[Delta]:
        self._begin()
        return self._iterate()

    def _iterate(self) -> Iterator[Delta]:
        # A separate generator: only the for loop holds it, so `break` drops it and this finally runs at once, even
        # while the Stream itself is referenced.
        try:
            while True:  # Python 3.12 and 3.13 keep the backward jump of a `while` with a condition outside the try
                delta = self._next()
                if delta is None:
                    break
                yield delta
        finally:
            self._leave()

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            StopIteration: the answer is complete, or the stream was closed.
            RuntimeError: another thread is reading.
            RequestTimeoutError: the deadline has passed; or another LMBridgeError.
        """
        delta = self._next()
        if delta is None:
            raise StopIteration
        return delta

    def wait(self, timeout: float | None = None) -> bool:
        """Block until ``next`` would return at once; False after ``timeout`` seconds. For readers that must act in the
        meantime, such as an HTTP response that keeps its connection alive."""
        call = self._call
        limit = None if timeout is None else time.monotonic() + timeout
        self._take_turn()
        try:
            while True:
                call.signalled = False
                if call.deltas or call.outcomes:
                    return True
                if limit is not None and time.monotonic() >= limit:
                    return False
                self._wait(call, limit)
        except BaseException:  # such as KeyboardInterrupt: nobody reads on
            self._leave()
            raise
        finally:
            self._turn.release()

    def close(self, error: LMBridgeError | None = None) -> None:
        """Abort generation if it is still running; a reader in another thread sees the end. Any thread, any time.

        Args:
            error: raised in the reader instead; it counts as the request's outcome.
        """
        if self._leave(error):
            self._call.channel.nudge(self._call)
        if not self._server.forked:
            self._account.report(self._call)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _take_turn(self) -> None:
        if self._server.forked:
            self._server.check_process()
        if not self._turn.acquire(False):
            raise RuntimeError("Another thread is reading this stream; give each thread its own.")

    def _next(self) -> Delta | None:
        """The next delta; None at the end."""
        call = self._call
        self._take_turn()
        try:
            while True:
                if (delta := call.take()) is not None:
                    return delta
                if call.outcomes and self._end():
                    return None
                self._wait(call, None)
        except LMBridgeError:
            raise
        except BaseException:  # such as KeyboardInterrupt: nobody reads on
            self._leave()
            raise
        finally:
            if call.ended:
                self._give_back()
            self._turn.release()

    def _give_back(self) -> None:
        if self._lent and not self._call.deltas:
            self._lent = False
            self._account.take_back(self._server, self._call.channel)

    def _wait(self, call: Call, limit: float | None) -> None:
        """Wait for a token, at most until ``limit``, and never forever."""
        remaining = None if call.request.deadline is None else self._server.remaining(call)
        if call.outcomes:
            return
        if get_ident() == self._server.thread_id:
            self._server.check_thread()
        if limit is not None:
            left = max(0.0, limit - time.monotonic())
            remaining = min(left, SLICE if remaining is None else remaining)
        try:
            call.channel.wait(True, remaining)
        except Empty:
            pass
        except Closed:
            call.settle(self._server.closed_error())
