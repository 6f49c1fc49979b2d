"""The future of several jobs that belong together.

Rule: the caller's end. Its parts are resolved as ``futures`` says; it only looks at them. Callbacks run where theirs
do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lmbridge.caller.account import Account
from lmbridge.caller.batch import Result
from lmbridge.caller.futures import ResponseFuture
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Request, Response

T = TypeVar("T")


class Gathered(concurrent.futures.Future[T], Generic[T]):
    """The future of a list of jobs. The first that fails ends all; ``cancel`` works until all are done.

    Args:
        shape: makes what is handed over of the results.
        owner: kept alive for as long as the future is.
    """

    def __init__(
        self,
        account: Account,
        requests: Sequence[Request | LMBridgeError],
        shape: Callable[[Sequence[Result]], T],
        owner: object,
    ) -> None:
        """Send the requests; raises what is wrong with them, and then none is left running."""
        super().__init__()
        self._shape = shape
        self._parts: list[ResponseFuture] = []
        self._left = [None] * len(requests)  # one is popped for each part that has ended, which is atomic
        try:
            for request in requests:
                if isinstance(request, LMBridgeError):
                    raise request
                self._parts.append(ResponseFuture(account, request, owner))
        except BaseException:
            self._cancel_parts()
            raise
        for part in self._parts:
            part.add_done_callback(self._on_end)
        if not self._parts:
            self._conclude()

    @property
    def request_ids(self) -> list[str]:
        """The ids of its requests, in order."""
        return [part.request_id for part in self._parts]

    def cancel(self) -> bool:
        """Abort what has not ended and release whoever waits; False when all was done already."""
        return self._cancel_parts() or self.cancelled()

    def cancelled(self) -> bool:
        return self.done() and self._failure() is not None and isinstance(self._failure(), _Cancelled)

    def running(self) -> bool:
        return not self.done() and any(part.running() or part.done() for part in self._parts)

    def done(self) -> bool:
        return all(part.done() for part in self._parts)

    def result(self, timeout: float | None = None) -> T:
        """What the verb would have returned; raises what it would have raised, or TimeoutError after ``timeout`` s."""
        self._wait(timeout)
        failure = self._failure()
        if failure is None:
            return self._shape([part.result(0) for part in self._parts])
        try:
            raise failure
        finally:
            del failure, self  # or the error would hold the frame that holds it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        failure = self._failure()
        if isinstance(failure, _Cancelled):
            raise failure
        return failure

    # --- its end ---

    def _wait(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        for part in self._parts:
            with contextlib.suppress(_Cancelled):
                part.exception(None if end is None else max(0.0, end - time.monotonic()))

    def _failure(self) -> BaseException | None:
        """The error of the part that failed, rather than of those that were cancelled for it; all have ended."""
        cancelled: BaseException | None = None
        for index, part in enumerate(self._parts):
            try:
                error = part.exception(0)
            except _Cancelled as left:
                cancelled = left
                continue
            if error is not None:
                if isinstance(error, LMBridgeError) and len(self._parts) > 1:
                    error.index = index
                return error
        return cancelled

    def _on_end(self, part: concurrent.futures.Future[Response]) -> None:
        """A part has ended; on a thread for callbacks, or on that of whoever gathers."""
        if part.cancelled() or part.exception(0) is not None:
            self._cancel_parts()
        self._left.pop()
        if not self._left:
            self._conclude()

    def _conclude(self) -> None:
        """Have the Future itself know, for those who wait by the standard library's means."""
        failure = self._failure()
        with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):
            if isinstance(failure, _Cancelled):
                super().cancel()
                self.set_running_or_notify_cancel()  # or wait() and as_completed() would go on waiting
            elif failure is not None:
                self.set_exception(failure)
            else:
                self.set_result(self._shape([part.result(0) for part in self._parts]))

    def _cancel_parts(self) -> bool:
        cancelled = [part.cancel() for part in self._parts if not part.done()]  # all, not only the first
        return any(cancelled)


_Cancelled = concurrent.futures.CancelledError
