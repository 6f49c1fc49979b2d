"""Resolves futures and runs their callbacks.

Rule: two daemon threads per bridge. ``Dispatcher`` runs no user code, so user code can neither block nor end it;
``Callbacks`` runs nothing else.
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

LOOK = 0.25  # seconds between checks of deadlines, which nobody else may be watching
PATIENCE = 1.0  # seconds after which another thread replaces a blocked one


class Pending(Protocol):
    """A future waiting for its call."""

    def conclude(self) -> None:
        """Take the outcome of its call, which has ended. Any thread, any number of times."""

    def inherit(self) -> None:
        """End in a forked child, where the call never ends."""


class Dispatcher:
    """Resolves the futures of one bridge."""

    def __init__(self, server: ServerHandle) -> None:
        self.channel: Channel[Call] = Channel()
        self.callbacks = Callbacks()
        self._server = server
        self._open: dict[Call, Pending] = {}  # any thread sets and pops; both atomic
        self._lock = threading.RLock()  # held while starting a thread; reentrant for signal handlers
        self._thread: threading.Thread | None = None
        self._launched = 0.0  # when it was started; guarded by _lock when written
        self._since: float | None = None  # when resolving the current future began; read by anyone
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
            self.channel.nudge(call)  # so that its deadline is seen

    def forget(self, call: Call) -> None:
        """Drop a call that could not be sent."""
        self._open.pop(call, None)

    def look_after(self) -> None:
        """Ensure that a thread resolves open futures, even if a future's lock is held."""
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
        """The futures inherited by a forked child, where nobody will resolve them."""
        left = list(self._open.values())
        self._open.clear()
        return left

    def _run(self) -> None:
        try:
            while self._thread is threading.current_thread():  # another replaces a blocked one
                if not self._goes_on():
                    self.callbacks.close()
                    return
        finally:  # two exceptions were thrown into this thread: another takes over
            if self._server.ended is None and self._thread is threading.current_thread():
                self._thread = None
                self.look_after()

    def _goes_on(self) -> bool:
        try:
            return self._next()
        except BaseException:
            logger.exception("An exception was thrown into the thread that resolves futures; it continues.")
            return True

    def _next(self) -> bool:
        """Resolve what has ended; False once no more can come."""
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
        """Enforce deadlines and find calls whose token was lost; a few times a second."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK
        for call in list(self._open):
            deadline = call.request.deadline
            if deadline is not None and now > deadline and call in self._server.gate.calls:
                self._server.expire(call)  # before it is registered, the sending thread checks it
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
        self._open.pop(call, None)  # only now: if an exception strikes earlier, the next look resolves it


class Callbacks:
    """Runs callbacks one after another; a blocking one delays the others by a second at most."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()  # any thread appends, the runner pops
        self._come: queue.SimpleQueue[None] = queue.SimpleQueue()  # signals that something waits
        self._lock = threading.RLock()  # held while starting a runner; reentrant for signal handlers
        self._runner: threading.Thread | None = None  # guarded by _lock when written, as is the next
        self._launched = 0.0  # when it was started
        self._since: float | None = None  # when the current callback began; written by the runner, read by anyone
        self._closed = False

    def run_soon(self, job: Callable[[], object]) -> None:
        """Run ``job`` on the callback thread. Any thread."""
        self._waiting.append(job)
        self._come.put(None)
        self.look_after()

    def look_after(self) -> None:
        """Ensure that a thread runs what waits, even if a callback ended or blocks the last one."""
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
        """Let the thread end once the queue is empty."""
        self._closed = True
        self._come.put(None)

    def _run(self) -> None:
        while self._runner is threading.current_thread():  # another replaces a blocked one
            if self._waiting:
                job = self._waiting[0]  # no exception can strike between these two
                del self._waiting[0]
                self._call(job)
                del job  # or what it references would live until the next job
            elif self._closed:
                return
            else:
                with contextlib.suppress(queue.Empty):
                    self._come.get(timeout=PATIENCE)

    def _call(self, job: Callable[[], object]) -> None:
        since = self._since = time.monotonic()
        try:
            job()
        except BaseException:  # sys.exit() ends the callback, not this thread
            logger.exception("A callback of a future failed.")
        finally:
            if self._since == since:  # nobody has replaced this thread
                self._since = None


def _launch(thread: threading.Thread) -> None:
    """Start it from another thread: an exception thrown into ``Thread.start`` can surface as a lock error."""
    started = Verdict()
    _thread.start_new_thread(_start, (thread, started))
    started.wait(PATIENCE)


def _start(thread: threading.Thread, started: Verdict) -> None:
    try:
        thread.start()
    finally:
        started.tell()


def _lives(thread: threading.Thread | None, age: float) -> bool:
    """Whether a thread runs, or was launched a moment ago and is about to."""
    return thread is not None and (thread.is_alive() or (thread.ident is None and age < PATIENCE))


_dispatchers: dict[int, weakref.ref[Dispatcher]] = {}  # all dispatchers, for a forked child


def _end_inherited() -> None:
    """In a forked child: end the inherited futures."""
    for reference in list(_dispatchers.values()):
        dispatcher = reference()
        if dispatcher is not None:
            for future in dispatcher.inherited():
                future.inherit()


os.register_at_fork(after_in_child=_end_inherited)
