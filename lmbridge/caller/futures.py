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
from lmbridge.crossing.endings import interrupted_error
from lmbridge.errors import ForkedError, LMBridgeError
from lmbridge.log import logger
from lmbridge.messages import Request, Response


class ResponseFuture(concurrent.futures.Future[Response]):
    """The future of one answer. ``cancel`` works until it is done: it aborts the generation.

    The lock of the Future, which an exception thrown into a thread could leave held, is taken by the dispatcher, for
    those who use the standard library's ``wait`` and ``as_completed``. All else here looks at the call.
    """

    def __init__(self, account: Account, request: Request, owner: object) -> None:
        """Send the request; raises what is wrong with it."""
        super().__init__()
        server = account.server(True)
        self._account = account
        self._owner = owner  # keeps the bridge alive for as long as the future is
        self._server = server
        self._dispatcher = account.access.dispatcher()
        self._call = account.call(request, self._dispatcher.channel)
        self._ended: Response | BaseException | None = None  # how it has ended; each who writes it writes the same
        self._told = False  # the Future itself knows its end, and callbacks were called; written by the dispatcher
        self._teller: int | None = None  # the id of the thread that tells it; written by the dispatcher
        self._callbacks: list[_Callback] = []  # appended by any thread
        self.heirs: list[Callable[[ForkedError], None]] = []  # told in a forked child that there is no end
        self._sleepers: list[threading.Lock] = []  # of threads that wait in result(); appended by them
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
        """Abort the generation and release whoever waits; False when the future is done already.

        Raises:
            ForkedError: this is a child of the process that the future belongs to.
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
        """The answer; raises what ``infer`` would have raised, or TimeoutError after ``timeout`` seconds."""
        ended = self._wait(timeout)
        if isinstance(ended, Response):
            return ended
        try:
            raise ended
        finally:
            del ended, self  # or the error would hold the frame that holds it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        ended = self._wait(timeout)
        if isinstance(ended, concurrent.futures.CancelledError):
            raise ended
        return None if isinstance(ended, Response) else ended

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Response]], object]) -> None:
        """Call ``fn`` with this future once it is done: at once if it is, else on a thread for callbacks."""
        callback = _Callback(fn, self)
        if self._told:
            callback()
            return
        self._callbacks.append(callback)
        if self._told:  # only now: the dispatcher may not have seen it
            self._dispatcher.callbacks.run_soon(callback)

    # --- its end ---

    def conclude(self) -> None:
        """Take over the outcome of the call, which has one, and tell everybody. By the dispatcher, more than once.

        What strikes the thread half way leaves a state from which the next one goes on.
        """
        ended = self._end()
        if self._told:
            return
        self._call_back()
        here = threading.get_ident()
        if self._teller in (None, here):  # or another was struck in there, and may have left the lock held
            self._teller = here
            self._tell(ended)
        self._told = True
        self._call_back()  # those that came meanwhile, too
        if self._account.observer is not None:
            self._dispatcher.callbacks.run_soon(functools.partial(self._account.report, self._call))

    def _call_back(self) -> None:
        for callback in list(self._callbacks):
            self._dispatcher.callbacks.run_soon(callback)

    def _tell(self, ended: Response | BaseException) -> None:
        """Have the Future itself know, for those who wait by the standard library's means."""
        with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):  # one who was struck had told it
            if isinstance(ended, concurrent.futures.CancelledError):
                super().cancel()
                self.set_running_or_notify_cancel()  # or wait() and as_completed() would go on waiting
            elif isinstance(ended, Response):
                self.set_result(ended)
            else:
                self.set_exception(ended)

    def _end(self) -> Response | BaseException:
        """Take over the outcome of the call, and wake those who wait in ``result``. Any thread, takes no lock."""
        ended = self._ended = self._ended or self._call.result()
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):  # it is awake
                sleeper.release()
        return ended

    def inherit(self) -> None:
        """End in a forked child, where the call has no end."""
        super().__init__()  # its lock may be held by a thread that does not exist here
        try:
            self._server.check_process()
        except ForkedError as error:
            self._ended, self._told = error, True
            self.set_exception(error)
            for heir in self.heirs:
                heir(error)

    def _wait(self, timeout: float | None) -> Response | BaseException:
        """Wait until the call has ended; looks by itself once a second.

        Raises:
            TimeoutError: ``timeout`` seconds have passed first.
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
    """What a user hangs on a future; called once, however often it is told to be."""

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
            logger.exception("A callback of the future of request %s failed.", self._future.request_id)
