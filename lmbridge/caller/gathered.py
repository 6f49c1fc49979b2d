"""One future for several jobs.

Rule: the caller's end. Its parts are resolved as in ``futures``, and its callbacks run where theirs do; this module
only reads them.
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
    """The future of one job or of several. The first failure aborts the rest; ``cancel`` works until all are done.

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
        """Send the requests; if one is invalid, raises and leaves none running.

        Args:
            kind: the kind of job.
            shape: turns the answers into the result.
            owner: kept alive as long as the future.
        """
        super().__init__()
        self.request_ids = [request.id for request in requests if isinstance(request, Request)]
        self._kind = kind
        self._shape = shape
        self._parts: list[ResponseFuture] = []  # emptied once the result is known
        self._left = [None] * len(requests)  # one is popped per ended part, atomically
        self._ended: tuple[T | None, BaseException | None] | None = None  # every writer writes the same
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
        """Abort what is still running and wake all waiters; False if everything is already done.

        Raises:
            ForkedError: the future belongs to the parent process.
        """
        return self._cancel_parts() or self.cancelled()

    def cancelled(self) -> bool:
        return self.done() and isinstance(self._end()[1], _Cancelled)

    def running(self) -> bool:
        return not self.done() and any(part.running() or part.done() for part in list(self._parts))

    def done(self) -> bool:
        parts = list(self._parts)  # before checking the end, which empties it
        return self._ended is not None or all(part.done() for part in parts)

    def result(self, timeout: float | None = None) -> T:
        """The verb's result; raises as the verb does, or TimeoutError after ``timeout`` seconds."""
        value, error = self._wait(timeout)
        try:
            if error is not None:
                raise error
            return cast(T, value)
        finally:
            del error, self  # break the reference cycle of error and frame

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
        """The result or error once all parts have ended. Any thread, takes no lock."""
        parts = list(self._parts)
        if self._ended is None:
            self._ended = self._ended or self._whole(parts)
            self._parts = []  # they reference this future
        return self._ended

    def _whole(self, parts: Sequence[ResponseFuture]) -> tuple[T | None, BaseException | None]:
        error = _first_error(parts, self._kind.noun)
        if error is not None:
            return None, error
        try:
            return self._shape(all_looked_at(self._kind, [part.result(0) for part in parts], False)), None
        except Exception as cause:  # the engine returned something else
            return None, cause

    def _on_end(self, part: concurrent.futures.Future[Response]) -> None:
        """A part has ended; on the callback thread or the gathering thread."""
        if part.cancelled() or part.exception(0) is not None:
            self._cancel_parts()
        self._left.pop()
        if not self._left:
            self._conclude()

    def _conclude(self) -> None:
        """Resolve the Future itself, for the standard library's waiters, and run callbacks."""
        value, error = self._end()
        with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):
            if isinstance(error, _Cancelled):
                super().cancel()
                self.set_running_or_notify_cancel()  # or wait() and as_completed() would wait forever
            elif error is not None:
                self.set_exception(error)
            else:
                self.set_result(cast(T, value))

    def _inherit(self, error: ForkedError) -> None:
        """End in a forked child, where its parts never end."""
        if self._ended is None:
            super().__init__()  # a thread that no longer exists may hold its lock
            self._ended = None, error
            self.set_exception(error)

    def _cancel_parts(self) -> bool:
        cancelled = [part.cancel() for part in list(self._parts) if not part.done()]  # all, not only the first
        return any(cancelled)


def _first_error(parts: Sequence[ResponseFuture], noun: str) -> BaseException | None:
    """The error of the part that failed, not of those cancelled because of it."""
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
