"""The way between a caller and the server thread: a pair of janus queues, and the doorbell that says look.

Rule: the only module that imports janus. A ``Call`` goes in by ``Channel.requests`` and is named again by each token
that comes back by ``Channel.replies``; what was generated waits on the call itself, so a slow reader costs one token,
not one per engine step.

Theory of operation:

1. A channel serves one consumer at a time: a thread in a call, the dispatcher of futures, or another event loop.
2. Nobody awaits ``requests.async_q.get()``: each put would cost a ``call_soon_threadsafe`` and a task. A put rings the
   one doorbell of all channels instead, and the loop drains them with ``get_nowait``.
3. Tokens are hints. Whoever gets one looks at the call it names, so a late, double or foreign token does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import janus

from lmbridge.call import Call
from lmbridge.errors import BridgeClosedError

T = TypeVar("T")


class _Condition:
    """The part of ``threading.Condition`` that janus uses, safe against exceptions thrown into a waiting thread.

    Ctrl-C and ``PyThreadState_SetAsyncExc`` strike between any two bytecodes. The standard class takes and gives back
    its lock in Python functions, so an exception that strikes inside them leaves the lock held, or gives back one that
    somebody else holds; seen to stick the server thread within seconds. Here each step is one call into C, and the
    interpreter looks for such exceptions only after it, inside the ``try`` or ``with`` that undoes the step.
    """

    __slots__ = ("_lock", "_waiters")

    __enter__ = property(operator.attrgetter("_lock.__enter__"))
    __exit__ = property(operator.attrgetter("_lock.__exit__"))

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiters: deque[threading.Lock] = deque()  # guarded by _lock

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back, wait to be notified, take it again. False when ``timeout`` seconds passed first."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        notified = False
        try:
            self._lock.release()
            notified = waiter.acquire(True, -1 if timeout is None else timeout)
        finally:
            self._lock.acquire()
            if not notified and waiter in self._waiters:
                self._waiters.remove(waiter)
        return notified

    def notify(self) -> None:
        """Wake the thread that has waited longest."""
        if self._waiters:
            self._waiters.popleft().release()

    def notify_all(self) -> None:
        while self._waiters:
            self._waiters.popleft().release()


class _Queue(janus.Queue[T]):
    """A janus queue whose sync side is safe to interrupt."""

    def __init__(self) -> None:
        super().__init__()
        # Attributes of janus 2; a test fails when a newer one stops using them.
        self._sync_not_empty = _Condition(self._sync_mutex)  # type: ignore[assignment]
        self._sync_not_full = _Condition(self._sync_mutex)  # type: ignore[assignment]

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        """janus refuses a second loop; ours may have to outlive a loop that is stuck and was left behind."""
        self._loop = asyncio.get_running_loop()
        return self._loop


class Channel:
    """One consumer's pair of janus queues.

    ``bell`` is set where the consumer is an event loop, which must be woken rather than blocked.
    """

    __slots__ = ("requests", "replies", "bell", "__weakref__")

    def __init__(self, bell: Doorbell | None = None) -> None:
        self.requests: _Queue[Call] = _Queue()
        self.replies: _Queue[Call] = _Queue()
        self.bell = bell

    # --- the caller's end: any thread but the server's ---

    def send(self, call: Call) -> None:
        """Put the call in. Never blocks.

        Raises:
            BridgeClosedError: the loop that would read it has ended.
        """
        try:
            self.requests.sync_q.put(call)
        except janus.SyncQueueShutDown:
            raise BridgeClosedError("The bridge was closed; the request was not sent.") from None

    def wait(self, timeout: float | None) -> Call | None:
        """Block for the next token, at most ``timeout`` seconds; None when none came.

        Raises:
            BridgeClosedError: there is no token and the loop that would send one has ended.
        """
        if timeout is not None:
            timeout = min(max(timeout, 0.0), threading.TIMEOUT_MAX)
        try:
            return self.replies.sync_q.get(timeout=timeout)
        except janus.SyncQueueEmpty:
            return None
        except janus.SyncQueueShutDown:
            raise BridgeClosedError("The bridge was closed.") from None

    def next_token(self) -> Call | None:
        """The next token that is there already; None when there is none. Raises as ``wait`` does."""
        try:
            return self.replies.sync_q.get_nowait()
        except janus.SyncQueueEmpty:
            return None
        except janus.SyncQueueShutDown:
            raise BridgeClosedError("The bridge was closed.") from None

    def nudge(self, call: Call) -> None:
        """Wake the consumer from any thread; takes a lock, so not from a finalizer or a signal handler."""
        try:
            self.replies.sync_q.put(call)
        except janus.SyncQueueShutDown:
            return
        if self.bell is not None:
            self.bell.ring()

    # --- the loop end: the server thread only ---

    def take(self) -> Call | None:
        """The next call that was sent."""
        try:
            return self.requests.async_q.get_nowait()
        except (janus.AsyncQueueEmpty, janus.AsyncQueueShutDown):
            return None

    def signal(self, call: Call) -> None:
        """Put a token back. The consumer is woken by the queue's own condition, with the GIL kept."""
        try:
            self.replies.async_q.put_nowait(call)
        except janus.AsyncQueueShutDown:
            return
        if self.bell is not None:
            self.bell.ring()

    def close(self) -> list[Call]:
        """Refuse further calls, wake the consumer, and return the calls nobody took. The loop need not run."""
        left = []
        self.requests.shutdown()
        while True:
            try:
                left.append(self.requests.sync_q.get_nowait())
            except (janus.SyncQueueEmpty, janus.SyncQueueShutDown):
                break
        self.replies.shutdown()
        if self.bell is not None:
            self.bell.ring()
        return left


class Doorbell:
    """Wakes one loop, at most once outstanding however many ring.

    It cannot stick for long: if a ringer is killed between raising the flag and calling the loop, its owner's sweep
    answers anyway and lowers the flag.
    """

    __slots__ = ("_loop", "_answer", "_rung")

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
        self._loop = loop
        self._answer = answer
        self._rung = False  # raised by any thread, lowered on the loop only

    def ring(self) -> None:
        """Have the loop answer soon. Any thread, finalizers and signal handlers too; takes no lock."""
        if self._rung:
            return
        self._rung = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: whatever ended it settles every call
            self._loop.call_soon_threadsafe(self.answer)

    def answer(self) -> None:
        """Look. On the loop only. The flag falls first, so that what comes meanwhile rings again."""
        self._rung = False
        self._answer()
