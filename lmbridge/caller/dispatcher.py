"""Resolves futures, and runs their callbacks.

Rule: two daemon threads of a bridge's own. ``Dispatcher`` runs none of a user's code, so it cannot be held up or ended
by it; ``Callbacks`` runs nothing else.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel, Closed, Empty
from lmbridge.crossing.handle import ServerHandle
from lmbridge.crossing.status import Verdict
from lmbridge.log import logger

LOOK = 0.25  # seconds between two looks at deadlines, which nobody else may be waiting for
PATIENCE = 1.0  # seconds after which somebody else takes over from a thread that is held up


class Pending(Protocol):
    """A future that waits for its call."""

    def conclude(self) -> None:
        """Take over the outcome of its call, which has one. Any thread, more than once."""

    def inherit(self) -> None:
        """End in a forked child, where the call has no end."""


class Dispatcher:
    """Resolves the futures of one bridge."""

    def __init__(self, server: ServerHandle) -> None:
        self.channel: Channel[Call] = Channel()
        self.callbacks = Callbacks()
        self._server = server
        self._open: dict[Call, Pending] = {}  # set by any thread, popped by any; both atomic
        self._lock = threading.RLock()  # held while a thread is started; a signal handler may come in between
        self._thread: threading.Thread | None = None
        self._launched = 0.0  # when it was started, which takes a moment; guarded by _lock when written
        self._since: float | None = None  # when a future was begun to be resolved; read by anyone
        self._next_look = 0.0  # dispatcher thread only
        key = id(self)
        _dispatchers[key] = weakref.ref(self, functools.partial(_dispatchers.pop, key))
        server.channels.register(self.channel)
        server.helpers.append(weakref.WeakMethod(self.look_after))

    def expect(self, call: Call, future: Pending) -> None:
        """Resolve ``future`` when ``call`` ends. Called before the call is sent."""
        self._open[call] = future
        self.look_after()
        if call.request.deadline is not None:
            self.channel.nudge(call)  # so that its deadline is looked at

    def forget(self, call: Call) -> None:
        """Drop a call that could not be sent."""
        self._open.pop(call, None)

    def look_after(self) -> None:
        """See that there is a thread to resolve what is open, also when somebody holds the lock of a future."""
        thread, since, now = self._thread, self._since, time.monotonic()
        held_up = since is not None and now - since > PATIENCE
        over = self._server.ended is not None and not self._open
        if over or (_lives(thread, now - self._launched) and not held_up):
            return
        with self._lock:
            if self._thread is thread:
                self._since, self._launched = None, now
                self._thread = threading.Thread(target=self._run, name="lmbridge futures", daemon=True)
                _launch(self._thread)

    def inherited(self) -> list[Pending]:
        """The futures that a forked child has inherited, and that nobody will resolve there."""
        left = list(self._open.values())
        self._open.clear()
        return left

    def _run(self) -> None:
        try:
            while self._thread is threading.current_thread():  # another takes over from one that is held up
                if not self._goes_on():
                    self.callbacks.close()
                    return
        finally:  # something was thrown into this thread, twice: another goes on
            if self._server.ended is None and self._thread is threading.current_thread():
                self._thread = None
                self.look_after()

    def _goes_on(self) -> bool:
        try:
            return self._next()
        except BaseException:
            logger.exception("The thread that resolves futures was struck; it goes on.")
            return True

    def _next(self) -> bool:
        """Resolve what has ended; False when nothing can come any more."""
        call: Call | None = None
        try:
            call = self.channel.wait(True, LOOK if self._open else PATIENCE)
        except Empty:
            pass
        except Closed:
            for left in list(self._open):
                left.settle(self._server.closed_error())
                self._resolve(left)
            return False
        if call is not None:
            self._resolve(call)
        self._look()
        return True

    def _look(self) -> None:
        """Keep deadlines, and find what no token announced; a few times a second."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK
        for call in list(self._open):
            deadline = call.request.deadline
            if deadline is not None and now > deadline and call in self._server.gate.calls:
                self._server.expire(call)  # before it is in the book, the thread that sends it looks
            self._resolve(call)
        self.callbacks.look_after()

    def _resolve(self, call: Call) -> None:
        if not call.outcomes:  # a nudge
            return
        future = self._open.get(call)
        if future is None:
            return
        self._since = time.monotonic()
        try:
            future.conclude()
        finally:
            self._since = None
        self._open.pop(call, None)  # only now: what strikes this thread before leaves it to the next look


class Callbacks:
    """Runs the callbacks of futures, one after another; one that blocks holds up the others for a second."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()  # any thread appends, the runner takes
        self._come: queue.SimpleQueue[None] = queue.SimpleQueue()  # says that something waits
        self._lock = threading.RLock()  # held while a runner is started; a signal handler may come in between
        self._runner: threading.Thread | None = None  # guarded by _lock when written, as is the next
        self._launched = 0.0  # when it was started, which takes a moment
        self._since: float | None = None  # when the present callback was begun; written by the runner, read by anyone
        self._closed = False

    def run_soon(self, job: Callable[[], object]) -> None:
        """Run ``job`` on a thread for callbacks. Any thread."""
        self._waiting.append(job)
        self._come.put(None)
        self.look_after()

    def look_after(self) -> None:
        """See that there is a thread for what waits, also when a callback has ended or blocks the last one."""
        runner, since, now = self._runner, self._since, time.monotonic()
        held_up = since is not None and now - since > PATIENCE
        if not self._waiting or (_lives(runner, now - self._launched) and not held_up):
            return
        with self._lock:
            if self._runner is runner:
                self._since, self._launched = None, now
                self._runner = threading.Thread(target=self._run, name="lmbridge callbacks", daemon=True)
                _launch(self._runner)

    def close(self) -> None:
        """Let the thread end after what waits."""
        self._closed = True
        self._come.put(None)

    def _run(self) -> None:
        while self._runner is threading.current_thread():  # another takes over from one that is held up
            if self._waiting:
                job = self._waiting[0]  # an exception thrown into this thread cannot strike between these two
                del self._waiting[0]
                self._call(job)
                del job  # or what it holds would live until the next one
            elif self._closed:
                return
            else:
                with contextlib.suppress(queue.Empty):
                    self._come.get(timeout=PATIENCE)

    def _call(self, job: Callable[[], object]) -> None:
        since = self._since = time.monotonic()
        try:
            job()
        except BaseException:  # sys.exit() in a callback ends the callback, and no thread of ours
            logger.exception("A callback of a future failed.")
        finally:
            if self._since == since:  # nobody has taken over meanwhile
                self._since = None


def _launch(thread: threading.Thread) -> None:
    """Have another start it: what strikes a thread in ``Thread.start`` can come out as an error of a lock in there."""
    started = Verdict()
    _thread.start_new_thread(_start, (thread, started))
    started.wait(PATIENCE)


def _start(thread: threading.Thread, started: Verdict) -> None:
    try:
        thread.start()
    finally:
        started.tell()


def _lives(thread: threading.Thread | None, age: float) -> bool:
    """Whether a thread runs, or was launched so few seconds ago that it is only about to."""
    return thread is not None and (thread.is_alive() or (thread.ident is None and age < PATIENCE))


_dispatchers: dict[int, weakref.ref[Dispatcher]] = {}  # all there are, for a child of this process


def _end_inherited() -> None:
    """In a forked child: end the futures that nobody resolves there."""
    for reference in list(_dispatchers.values()):
        dispatcher = reference()
        if dispatcher is not None:
            for future in dispatcher.inherited():
                future.inherit()


os.register_at_fork(after_in_child=_end_inherited)
