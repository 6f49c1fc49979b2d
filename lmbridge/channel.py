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

import _thread
import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import janus

from lmbridge.call import Call
from lmbridge.relay import Relay

T = TypeVar("T")
Empty = janus.SyncQueueEmpty
Closed = janus.SyncQueueShutDown


class _Condition(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """The lock of a janus queue and its condition in one, safe against exceptions thrown into a waiting thread.

    Ctrl-C and ``PyThreadState_SetAsyncExc`` strike between any two bytecodes. ``threading.Condition`` takes and gives
    back its lock in Python functions, so an exception that strikes inside them leaves the lock held, or gives back one
    that somebody else holds; seen to stick the server thread within seconds. Here each step is one call into C, and the
    interpreter looks for such exceptions only after it, inside the ``try`` or ``with`` that undoes the step.
    """

    __slots__ = ("_relay", "_waiters", "_spare")

    def __init__(self, relay: Relay | None) -> None:
        self._relay = relay
        self._waiters: list[threading.Lock] = []  # guarded by the lock itself, as is the next
        self._spare: threading.Lock | None = None  # a waiter of earlier, held, to be used again

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back, wait to be notified, take it again. False when ``timeout`` seconds passed first."""
        waiter, self._spare = self._spare, None
        if waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
        self._waiters.append(waiter)
        notified = False
        try:
            self.release()
            notified = waiter.acquire(True, -1 if timeout is None else timeout)
        finally:
            if self._relay is not None:
                self._relay.pass_on()
            self.acquire()
            if not notified and waiter in self._waiters:
                self._waiters.remove(waiter)
        if notified:  # otherwise somebody may have released it meanwhile
            self._spare = waiter
        return notified

    def notify(self) -> None:
        """Wake the thread that has waited longest."""
        if self._waiters:
            waiter = self._waiters.pop(0)
            if self._relay is None:
                waiter.release()
            else:
                self._relay.wake(waiter)

    def notify_all(self) -> None:
        while self._waiters:
            self._waiters.pop(0).release()


class _Queue(janus.Queue[T]):
    """A janus queue, unbounded, whose sync side is safe to interrupt and whose async side never waits.

    It sets janus 2's attributes itself rather than have janus make six conditions nobody waits on: a tenth of the time
    and of the memory. A test fails when a newer janus has others.
    """

    def __init__(self, relay: Relay | None = None) -> None:
        self._maxsize = 0
        self._is_shutdown = False
        self._unfinished_tasks = 0
        self._queue = deque()
        self._put_internal = self._queue.append  # type: ignore[assignment, method-assign]
        self._get = self._queue.popleft  # type: ignore[method-assign]
        self._qsize = self._queue.__len__  # type: ignore[method-assign]
        self._sync_mutex = self._sync_not_empty = self._sync_not_full = _Condition(relay)  # type: ignore[assignment]
        self._sync_not_empty_waiting = self._sync_not_full_waiting = self._sync_tasks_done_waiting = 0
        self._async_not_empty_waiting = self._async_not_full_waiting = self._async_tasks_done_waiting = 0
        self._sync_queue = janus._SyncQueueProxy(self)
        self._async_queue = janus._AsyncQueueProxy(self)

    # janus asks for the running loop to refuse a second one; ours may have to outlive a loop that is stuck and was left
    # behind. So the question is answered by the cheapest function there is, and the answer is not looked at.
    _get_loop = staticmethod(threading.get_ident)  # type: ignore[assignment]


class Channel:
    """One consumer's pair of janus queues.

    ``bell`` is set where the consumer is an event loop, which must be woken rather than blocked.

    Attributes:
        send: put a call in, from the caller's end; never blocks; raises ``Closed``.
        wait: ``wait(True, timeout)`` blocks for the next token at the caller's end, at most ``timeout`` seconds (>= 0;
            None: forever); raises ``Empty`` when none came, ``Closed`` when none can come.
    """

    __slots__ = ("requests", "replies", "bell", "send", "wait", "_take", "_reply", "__weakref__")

    def __init__(self, bell: Doorbell | None = None, relay: Relay | None = None) -> None:
        self.requests: _Queue[Call] = _Queue()
        self.replies: _Queue[Call] = _Queue(relay)
        self.bell = bell
        # janus' own methods, called as they are: a call of ours around each would be a tenth of a request's cost.
        self.send = self.requests.sync_q.put
        self.wait = self.replies.sync_q.get
        self._take = self.requests.async_q.get_nowait
        self._reply = self.replies.async_q.put_nowait

    # --- the caller's end: any thread but the server's ---

    def nudge(self, call: Call) -> None:
        """Wake the consumer from any thread; takes a lock, so not from a finalizer or a signal handler."""
        try:
            self.replies.sync_q.put(call)
        except Closed:
            return
        if self.bell is not None:
            self.bell.ring()

    # --- the loop end: the server thread only ---

    def take(self) -> Call | None:
        """The next call that was sent."""
        if not self.requests._queue:
            return None
        try:
            return self._take()
        except (janus.AsyncQueueEmpty, janus.AsyncQueueShutDown):
            return None

    def signal(self, call: Call) -> None:
        """Tell the reader of a call that there is something to look at, unless a token is on its way already.

        It is woken by the queue's own condition, with the GIL kept.
        """
        if call.signalled:
            return
        call.signalled = True
        try:
            self._reply(call)
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
            except (Empty, Closed):
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

    __slots__ = ("_loop", "_answer", "rung")

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
        self._loop = loop
        self._answer = answer
        self.rung = False  # raised by any thread, lowered on the loop only

    def ring(self) -> None:
        """Have the loop answer soon. Any thread, finalizers and signal handlers too; takes no lock."""
        if self.rung:
            return
        self.rung = True
        try:  # noqa: SIM105  contextlib.suppress costs as much as the rest of a ring
            self._loop.call_soon_threadsafe(self.answer)
        except RuntimeError:  # the loop is closed: whatever ended it settles every call
            pass

    def answer(self) -> None:
        """Look. On the loop only. The flag falls first, so that what comes meanwhile rings again."""
        self.rung = False
        self._answer()
