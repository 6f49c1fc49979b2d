"""Answers as ``concurrent.futures.Future``.

Rule: the caller's end. A future is resolved by the dispatcher's thread, by whoever waits for it, or by whoever cancels
it, whichever comes first; its callbacks run on a thread for callbacks, so they may call the bridge, block and fail.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable

from lmbridge.caller.account import Account
from lmbridge.caller.answer import send
from lmbridge.crossing.channel import SLICE
from lmbridge.errors import ForkedError
from lmbridge.messages import Request, Response


class ResponseFuture(concurrent.futures.Future[Response]):
    """The future of one answer. ``cancel`` works until it is done: it aborts the generation."""

    def __init__(self, account: Account, request: Request, owner: object) -> None:
        """Send the request; raises what is wrong with it."""
        super().__init__()
        server = account.server(True)
        self._account = account
        self._owner = owner  # keeps the bridge alive for as long as the future is
        self._server = server
        self._dispatcher = account.access.dispatcher()
        self._call = account.call(request, self._dispatcher.channel)
        self._concluding = threading.RLock()
        self._concluded = False  # guarded by _concluding; read by anyone
        self._sleepers: list[threading.Lock] = []  # of threads that wait in result(); appended by them
        self._dispatcher.expect(self._call, self)
        waiting = account.lease(server)
        try:
            sent = send(server, self._call, waiting)
        except BaseException:
            self._dispatcher.forget(self._call)
            account.report(self._call)
            raise
        account.take_back(server, waiting)
        if not sent:
            self._dispatcher.forget(self._call)
            account.report(self._call)
            self._call.response()

    @property
    def request_id(self) -> str:
        return self._call.request.id

    def cancel(self) -> bool:
        """Abort the generation and release whoever waits; False when the future is done already.

        Raises:
            ForkedError: this is a child of the process that the future belongs to.
        """
        self._server.check_process()
        if not self._call.settle(concurrent.futures.CancelledError()):
            return self.cancelled()
        self._server.abort(self._call)
        self.conclude()
        return True

    def running(self) -> bool:
        return not self.done() and self._call.began is not None

    def result(self, timeout: float | None = None) -> Response:
        """The answer; raises what ``infer`` would have raised, or TimeoutError after ``timeout`` seconds."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Response]], object]) -> None:
        """Call ``fn`` with this future once it is done: at once if it is, else on a thread for callbacks."""
        if self.done():
            super().add_done_callback(fn)
        else:
            job = functools.partial(fn, self)
            super().add_done_callback(lambda _: self._dispatcher.callbacks.run_soon(job))

    # --- its end ---

    def conclude(self) -> None:
        """Take over the outcome of the call, which has one. Any thread, more than once.

        What strikes the thread half way leaves a state from which the next one goes on.
        """
        with self._concluding:
            if self._concluded:
                return
            if isinstance(self._call.outcome, concurrent.futures.CancelledError):
                self._conclude_cancelled()
            elif not self.done():
                result = self._call.result()
                if isinstance(result, Response):
                    self.set_result(result)
                else:
                    self.set_exception(result)
            self._concluded = True
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):  # it is awake
                sleeper.release()
        if self._account.observer is not None:
            self._dispatcher.callbacks.run_soon(functools.partial(self._account.report, self._call))

    def inherit(self) -> None:
        """End in a forked child, where the call has no end."""
        super().__init__()  # its lock may be held by a thread that does not exist here
        try:
            self._server.check_process()
        except ForkedError as error:
            self.set_exception(error)

    def _conclude_cancelled(self) -> None:
        if not self.cancelled():
            super().cancel()
        with contextlib.suppress(RuntimeError):  # whoever was struck half way has done it
            self.set_running_or_notify_cancel()  # or wait() and as_completed() would go on waiting

    def _wait(self, timeout: float | None) -> None:
        """Wait until the future is done or ``timeout`` seconds have passed; looks by itself once a second.

        Not on the lock of the Future, which an exception thrown into this thread could leave held.
        """
        self._server.check_process()
        end = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            remaining = self._server.remaining(self._call)
            if self._call.outcomes:
                self.conclude()
                return
            left = SLICE if end is None else end - time.monotonic()
            if left <= 0:
                return
            self._sleep(left if remaining is None else min(left, remaining))

    def _sleep(self, seconds: float) -> None:
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            if not self._concluded:
                sleeper.acquire(True, min(seconds, SLICE))
        finally:
            self._sleepers.remove(sleeper)
