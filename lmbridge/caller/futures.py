"""Answers as ``concurrent.futures.Future``.

Rule: the caller's end. A future is resolved by the dispatcher's thread, by a waiter or by whoever cancels it, whichever
comes first. Callbacks run on the callback thread, so they may call the bridge, block and fail.
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
from lmbridge.crossing.endings import interrupted_error
from lmbridge.errors import ForkedError, LMBridgeError
from lmbridge.log import logger
from lmbridge.messages import Request, Response


class ResponseFuture(concurrent.futures.Future[Response]):
    """The future of one answer. Until it is done, ``cancel`` works and aborts generation.

    The Future's own lock, which an exception thrown into a thread could leave held, is taken only by the dispatcher,
    for the standard library's ``wait`` and ``as_completed``. Everything else here reads the call.
    """

    def __init__(self, account: Account, request: Request, owner: object) -> None:
        """Send the request; raises if it is invalid."""
        super().__init__()
        server = account.server(True)
        self._account = account
        self._owner = owner  # keeps the bridge alive as long as the future
        self._server = server
        self._dispatcher = account.access.dispatcher()
        self._call = account.call(request, self._dispatcher.channel)
        self._ended: Response | BaseException | None = None  # its end; every writer writes the same
        self._told = False  # the Future is resolved and callbacks were called; written by the dispatcher
        self._teller: int | None = None  # id of the thread resolving it; written by the dispatcher
        self._callbacks: list[_Callback] = []  # appended by any thread
        self.heirs: list[Callable[[ForkedError], None]] = []  # called in a forked child
        self._sleepers: list[threading.Lock] = []  # of threads waiting in result(); appended by them
        try:
            self._dispatcher.expect(self._call, self)
            waiting = account.lease(server)
            sent = send(server, self._call, waiting)
        except BaseException as error:
            self._call.settle(error if isinstance(error, LMBridgeError) else interrupted_error())
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
        """Abort generation and wake all waiters; False if the future is already done.

        Raises:
            ForkedError: the future belongs to the parent process.
        """
        self._server.check_process()
        if not self._call.settle(concurrent.futures.CancelledError()):
            return self.cancelled()
        self._server.abort(self._call)
        self._end()
        self._dispatcher.channel.nudge(self._call)
        return True

    def cancelled(self) -> bool:
        return isinstance(self._ended, concurrent.futures.CancelledError)

    def running(self) -> bool:
        return self._ended is None and self._call.began is not None

    def done(self) -> bool:
        return self._ended is not None

    def result(self, timeout: float | None = None) -> Response:
        """The answer; raises as ``infer`` does, or TimeoutError after ``timeout`` seconds."""
        ended = self._wait(timeout)
        if isinstance(ended, Response):
            return ended
        try:
            raise ended
        finally:
            del ended, self  # break the reference cycle of error and frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        ended = self._wait(timeout)
        if isinstance(ended, concurrent.futures.CancelledError):
            raise ended
        return None if isinstance(ended, Response) else ended

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Response]], object]) -> None:
        """Call ``fn`` with this future once it is done: at once if it is, else on the callback thread."""
        callback = _Callback(fn, self)
        if self._told:
            callback()
            return
        self._callbacks.append(callback)
        if self._told:  # only now: the dispatcher may have missed it
            self._dispatcher.callbacks.run_soon(callback)

    # --- its end ---

    def conclude(self) -> None:
        """Take the outcome of the ended call, and notify everyone. By the dispatcher, any number of times.

        If an exception strikes half way, the next attempt continues.
        """
        ended = self._end()
        if self._told:
            return
        self._call_back()
        here = threading.get_ident()
        if self._teller in (None, here):  # else a struck thread may have left the lock held
            self._teller = here
            self._tell(ended)
        self._told = True
        self._call_back()  # also those added meanwhile
        if self._account.observer is not None:
            self._dispatcher.callbacks.run_soon(functools.partial(self._account.report, self._call))

    def _call_back(self) -> None:
        for callback in list(self._callbacks):
            self._dispatcher.callbacks.run_soon(callback)

    def _tell(self, ended: Response | BaseException) -> None:
        """Resolve the Future itself, for the standard library's ``wait`` and ``as_completed``."""
        with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):  # already told
            if isinstance(ended, concurrent.futures.CancelledError):
                super().cancel()
                self.set_running_or_notify_cancel()  # or wait() and as_completed() would wait forever
            elif isinstance(ended, Response):
                self.set_result(ended)
            else:
                self.set_exception(ended)

    def _end(self) -> Response | BaseException:
        """Take the outcome of the call and wake threads in ``result``. Any thread, takes no lock."""
        ended = self._ended = self._ended or self._call.result()
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):  # already awake
                sleeper.release()
        return ended

    def inherit(self) -> None:
        """End in a forked child, where the call never ends."""
        super().__init__()  # a thread that no longer exists may hold its lock
        try:
            self._server.check_process()
        except ForkedError as error:
            self._ended, self._told = error, True
            self.set_exception(error)
            for heir in self.heirs:
                heir(error)

    def _wait(self, timeout: float | None) -> Response | BaseException:
        """Wait until the call has ended; checks once a second even without a wake-up.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds.
        """
        if self._ended is None:
            self._server.check_process()
        end = None if timeout is None else time.monotonic() + timeout
        while self._ended is None:
            remaining = self._server.remaining(self._call)
            if self._call.outcomes:
                return self._end()
            self._server.check_thread()
            left = SLICE if end is None else end - time.monotonic()
            if left <= 0:
                raise concurrent.futures.TimeoutError
            self._sleep(left if remaining is None else min(left, remaining))
            self._dispatcher.look_after()
        return self._ended

    def _sleep(self, seconds: float) -> None:
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            if self._ended is None:
                sleeper.acquire(True, min(seconds, SLICE))
        finally:
            self._sleepers.remove(sleeper)


class _Callback:
    """A user's callback; runs once, however often it is called."""

    def __init__(self, fn: Callable[[concurrent.futures.Future[Response]], object], future: ResponseFuture) -> None:
        self._left = [fn]
        self._future = future

    def __call__(self) -> None:
        try:
            fn = self._left.pop()
        except IndexError:
            return
        try:
            fn(self._future)
        except Exception:
            logger.exception("A callback for the future of request %s failed.", self._future.request_id)
