"""The future of several jobs that belong together.

Rule: the caller's end. Its parts are resolved as ``futures`` says, and its callbacks run where theirs do; it only looks
at them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

from lmbridge.caller.account import Account
from lmbridge.caller.batch import Result
from lmbridge.caller.futures import ResponseFuture
from lmbridge.caller.shapes import all_looked_at
from lmbridge.errors import ForkedError, LMBridgeError
from lmbridge.messages import Job, Request, Response

T = TypeVar("T")
_Cancelled = concurrent.futures.CancelledError


class Gathered(concurrent.futures.Future[T], Generic[T]):
    """The future of one job or of a list of them. The first that fails ends all; ``cancel`` works until all are done.

    Attributes:
        request_ids: the ids of its requests, in order.
    """

    def __init__(
        self,
        account: Account,
        kind: type[Job],
        requests: Sequence[Request | LMBridgeError],
        shape: Callable[[Sequence[Result]], T],
        owner: object,
    ) -> None:
        """Send the requests; raises what is wrong with them, and then none is left running.

        Args:
            kind: what is asked for.
            shape: makes what is handed over of their answers.
            owner: kept alive for as long as the future is.
        """
        super().__init__()
        self.request_ids = [request.id for request in requests if isinstance(request, Request)]
        self._kind = kind
        self._shape = shape
        self._parts: list[ResponseFuture] = []  # emptied once how they ended is known
        self._left = [None] * len(requests)  # one is popped for each that has ended, which is atomic
        self._ended: tuple[T | None, BaseException | None] | None = None  # each who writes it writes the same
        try:
            for request in requests:
                if isinstance(request, LMBridgeError):
                    raise request
                self._parts.append(ResponseFuture(account, request, owner))
            for part in list(self._parts):
                part.heirs.append(self._inherit)
                part.add_done_callback(self._on_end)
        except BaseException:
            self._cancel_parts()
            raise
        if not requests:
            self._conclude()

    def cancel(self) -> bool:
        """Abort what has not ended and release whoever waits; False when all was done already.

        Raises:
            ForkedError: this is a child of the process that the future belongs to.
        """
        return self._cancel_parts() or self.cancelled()

    def cancelled(self) -> bool:
        return self.done() and isinstance(self._end()[1], _Cancelled)

    def running(self) -> bool:
        return not self.done() and any(part.running() or part.done() for part in list(self._parts))

    def done(self) -> bool:
        parts = list(self._parts)  # before the look at the end, which empties it
        return self._ended is not None or all(part.done() for part in parts)

    def result(self, timeout: float | None = None) -> T:
        """What the verb would have returned; raises what it would have raised, or TimeoutError after ``timeout`` s."""
        value, error = self._wait(timeout)
        try:
            if error is not None:
                raise error
            return cast(T, value)
        finally:
            del error, self  # or the error would hold the frame that holds it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = self._wait(timeout)[1]
        if isinstance(error, _Cancelled):
            raise error
        return error

    # --- its end ---

    def _wait(self, timeout: float | None) -> tuple[T | None, BaseException | None]:
        end = None if timeout is None else time.monotonic() + timeout
        for part in list(self._parts):
            with contextlib.suppress(_Cancelled):
                part.exception(None if end is None else max(0.0, end - time.monotonic()))
        return self._end()

    def _end(self) -> tuple[T | None, BaseException | None]:
        """How all of them have ended, once they have. Any thread, takes no lock."""
        parts = list(self._parts)
        if self._ended is None:
            self._ended = self._ended or self._whole(parts)
            self._parts = []  # they hold this future
        return self._ended

    def _whole(self, parts: Sequence[ResponseFuture]) -> tuple[T | None, BaseException | None]:
        error = _first_error(parts, self._kind.noun)
        if error is not None:
            return None, error
        try:
            return self._shape(all_looked_at(self._kind, [part.result(0) for part in parts], False)), None
        except Exception as cause:  # the engine gave something else
            return None, cause

    def _on_end(self, part: concurrent.futures.Future[Response]) -> None:
        """One has ended; on a thread for callbacks, or on that of whoever gathers."""
        if part.cancelled() or part.exception(0) is not None:
            self._cancel_parts()
        self._left.pop()
        if not self._left:
            self._conclude()

    def _conclude(self) -> None:
        """Have the Future itself know, for those who wait by the standard library's means, and call callbacks."""
        value, error = self._end()
        with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):
            if isinstance(error, _Cancelled):
                super().cancel()
                self.set_running_or_notify_cancel()  # or wait() and as_completed() would go on waiting
            elif error is not None:
                self.set_exception(error)
            else:
                self.set_result(cast(T, value))

    def _inherit(self, error: ForkedError) -> None:
        """End in a forked child, where its parts have no end."""
        if self._ended is None:
            super().__init__()  # its lock may be held by a thread that does not exist here
            self._ended = None, error
            self.set_exception(error)

    def _cancel_parts(self) -> bool:
        cancelled = [part.cancel() for part in list(self._parts) if not part.done()]  # all, not only the first
        return any(cancelled)


def _first_error(parts: Sequence[ResponseFuture], noun: str) -> BaseException | None:
    """The error of the one that failed, rather than of those that were cancelled for it."""
    left: BaseException | None = None
    for index, part in enumerate(parts):
        try:
            error = part.exception(0)
        except _Cancelled as cancelled:
            left = cancelled
            continue
        if error is not None:
            if isinstance(error, LMBridgeError) and len(parts) > 1:
                error.index, error.listed = index, noun
            return error
    return left
