"""Answers as ``concurrent.futures.Future``, resolved by one dispatcher thread.

Rule: a future's callbacks run on the dispatcher, never on the server thread, so they may call the bridge. The
dispatcher is a client like any other: it has a channel, and all futures' tokens come back by it.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import TYPE_CHECKING

from lmbridge.crossing.call import Call, timeout_error
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.messages import Response

if TYPE_CHECKING:
    from lmbridge.server.server import Server

_DEADLINE_LOOK = 0.25  # seconds between two looks at deadlines, which nobody else may be waiting for


class ResponseFuture(concurrent.futures.Future[Response]):
    """The future of one answer. ``cancel`` works until it is done: it aborts the generation."""

    def __init__(self, server: Server, call: Call, owner: object) -> None:
        super().__init__()
        self._owner = owner  # keeps the bridge alive for as long as the future is
        self._server = server
        self._call = call

    @property
    def request_id(self) -> str:
        return self._call.request.id

    def cancel(self) -> bool:
        """Abort the generation and release whoever waits; False when the future is done already."""
        if not self._call.settle(concurrent.futures.CancelledError()):
            return self.cancelled()
        super().cancel()
        self.set_running_or_notify_cancel()  # or wait() and as_completed() would go on waiting
        self._server.abort(self._call)
        return True

    def running(self) -> bool:
        return not self.done() and self._call.began is not None

    def result(self, timeout: float | None = None) -> Response:
        """The answer; raises what ``infer`` would have raised, or TimeoutError after ``timeout`` seconds."""
        self._server.check_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._server.check_process()
        return super().exception(timeout)


class Dispatcher:
    """Resolves the futures of one bridge on a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.channel = Channel()
        server.register(self.channel)
        self._open: dict[Call, ResponseFuture] = {}  # set by any thread, popped by the dispatcher; both atomic
        self._next_look = 0.0  # dispatcher only
        self._thread = threading.Thread(target=self._run, name="lmbridge futures", daemon=True)
        self._thread.start()

    def expect(self, call: Call, future: ResponseFuture) -> None:
        """Resolve ``future`` when ``call`` ends. Called before the call is sent."""
        self._open[call] = future
        if call.request.deadline is not None:
            self.channel.nudge(call)  # so that the dispatcher looks at its deadline

    def forget(self, call: Call) -> None:
        """Drop a call that could not be sent."""
        self._open.pop(call, None)

    def _run(self) -> None:
        while True:
            try:
                call = self.channel.wait(True, _DEADLINE_LOOK if self._open else None)
                self._resolve(call)
                del call  # the thread must not keep an answer alive while it waits for the next
            except Empty:
                pass
            except Closed:
                break
            self._expire(time.monotonic())
        for call in list(self._open):
            call.settle(self._server.closed_error())
            self._resolve(call)

    def _resolve(self, call: Call) -> None:
        if call.outcome is None:  # a nudge
            return
        future = self._open.pop(call, None)
        if future is None or future.cancelled():
            return
        try:
            response = call.response()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(response)

    def _expire(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + _DEADLINE_LOOK
        for call in list(self._open):
            deadline = call.request.deadline
            if deadline is not None and now > deadline and call.settle(timeout_error(call)):
                self._server.abort(call)
                self._resolve(call)
