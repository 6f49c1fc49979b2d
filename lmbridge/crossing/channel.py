"""The way between a caller and the server thread: a pair of janus queues, and the doorbell that says look.

Rule: the only module that imports janus. A call goes in by ``Channel.requests`` and is named again by each token
that comes back by ``Channel.replies``; what was generated waits on the call itself, so a slow reader costs one token,
not one per engine step.

Theory of operation:

1. A channel serves one consumer at a time: a thread in a call, the dispatcher of futures, or another event loop.
2. Nobody awaits a queue: each put would cost a ``call_soon_threadsafe`` and a task. A put rings the one doorbell of all
   channels instead, and the loop drains them without waiting.
3. Both ends use janus' sync side: without a bound a put never blocks there, and the async side binds itself to its
   first loop, where ours may have to outlive a loop that is stuck and was left behind.
4. Tokens are hints. Whoever gets one looks at the call it names, so a late, double or foreign token does no harm.
"""

from __future__ import annotations

import _thread
import threading
from typing import Generic, Protocol, TypeVar

import janus

from lmbridge.crossing.doorbell import Doorbell
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.errors import MissingDependencyError


class Named(Protocol):
    """What goes through a channel. ``signalled``: a token that names it is on its way; its reader clears that."""

    signalled: bool


T = TypeVar("T")
C = TypeVar("C", bound=Named)
TRIED = "2.0.0"  # versions of janus; setup.cfg has the bounds
SLICE = 1.0  # seconds after which whoever waits looks again by himself: a lost wake-up costs that much, and no caller
LOCKS = ("_sync_mutex", "_sync_not_empty", "_sync_not_full", "_sync_tasks_done")  # all that a janus queue has


def _check_janus() -> None:
    """See that the locks of a janus queue are those that are exchanged here.

    Raises:
        MissingDependencyError: they are not, so a Ctrl-C at the wrong moment could leave one held for good.
    """
    kinds = (type(threading.Lock()), _thread.RLock, threading.Condition)
    try:
        _ = janus.SyncQueueEmpty, janus.SyncQueueShutDown
        found = {name for name, value in vars(janus.Queue()).items() if isinstance(value, kinds)}
        changes = [f"Queue.{name} is {'new' if name in found else 'gone'}" for name in sorted(found ^ set(LOCKS))]
    except Exception as error:  # an older one needs a running loop, and has no shutdown
        changes = [f"{type(error).__name__}: {error}"]
    if changes:
        raise MissingDependencyError(
            f"janus {getattr(janus, '__version__', '(of no version)')} is not as lmbridge knows it "
            f"({', '.join(changes)}), so its queues could lock up for good. Use a version that was tried ({TRIED}): "
            "pip install 'janus>=2.0,<2.1'; or a newer lmbridge."
        )


_check_janus()
Empty = janus.SyncQueueEmpty
Closed = janus.SyncQueueShutDown


class _Condition(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """The lock of a janus queue and its condition in one, safe against exceptions thrown into a waiting thread.

    Ctrl-C and ``PyThreadState_SetAsyncExc`` strike between any two bytecodes. ``threading.Condition`` takes and gives
    back its lock in Python functions, so an exception that strikes inside them leaves the lock held, or gives back one
    that somebody else holds; seen to stick the server thread within seconds. Here each step is one call into C, and the
    interpreter looks for such exceptions only after it, inside the ``try`` or ``with`` that undoes the step.
    """

    __slots__ = ("_wakes", "_waiters", "_spare")

    def __init__(self, wakes: WakeChain | None) -> None:
        self._wakes = wakes
        self._waiters: list[threading.Lock] = []  # guarded by the lock itself, as is the next
        self._spare: threading.Lock | None = None  # a waiter of earlier, held, to be used again

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back, wait to be notified, take it again. False when ``timeout`` seconds passed first.

        Raises:
            Empty: there was no timeout, and nothing came for a second. Who waits without a limit looks again then.
        """
        waiter, self._spare = self._spare, None
        if waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
        self._waiters.append(waiter)
        notified = False
        try:
            self.release()
            notified = waiter.acquire(True, SLICE if timeout is None else timeout)
        finally:
            try:
                if self._wakes is not None:
                    self._wakes.pass_on()
            finally:
                self.acquire()
                if not notified and waiter in self._waiters:
                    self._waiters.remove(waiter)
        if notified:  # otherwise somebody may have released it meanwhile
            self._spare = waiter
        elif timeout is None:
            raise Empty
        return notified

    def notify(self) -> None:
        """Wake the thread that has waited longest."""
        if self._waiters:
            waiter = self._waiters.pop(0)
            if self._wakes is None:
                waiter.release()
            else:
                self._wakes.wake(waiter)

    def notify_all(self) -> None:
        while self._waiters:
            self._waiters.pop(0).release()


class _Queue(janus.Queue[T]):
    """A janus queue, unbounded, whose sync side is safe to interrupt.

    Its locks are exchanged for one of ours, by names that janus does not document; nothing else of it is touched.
    """

    def __init__(self, wakes: WakeChain | None = None) -> None:
        super().__init__()
        lock = _Condition(wakes)
        for name in LOCKS:  # not by way of __dict__, which would make every later look at the queue slower
            setattr(self, name, lock)


class Channel(Generic[C]):
    """One consumer's pair of janus queues.

    ``bell`` is set where the consumer is an event loop, which must be woken rather than blocked.

    Attributes:
        send: put a call in, from the caller's end; never blocks; raises ``Closed``.
        wait: ``wait(True, timeout)`` blocks for the next token at the caller's end, at most ``timeout`` seconds (>= 0;
            None: a second); raises ``Empty`` when none came, ``Closed`` when none can come.
    """

    __slots__ = ("requests", "replies", "bell", "send", "wait", "_sent", "_take", "_reply", "__weakref__")

    def __init__(self, bell: Doorbell | None = None, wakes: WakeChain | None = None) -> None:
        self.requests: _Queue[C] = _Queue()
        self.replies: _Queue[C] = _Queue(wakes)
        self.bell = bell
        # janus' own methods, called as they are: a call of ours around each would be a tenth of a request's cost.
        self.send = self.requests.sync_q.put
        self.wait = self.replies.sync_q.get
        self._sent = self.requests.sync_q.qsize
        self._take = self.requests.sync_q.get
        self._reply = self.replies.sync_q.put

    # --- the caller's end: any thread but the server's ---

    def nudge(self, call: C) -> None:
        """Wake the consumer from any thread; takes a lock, so not from a finalizer or a signal handler."""
        try:
            self.replies.sync_q.put(call)
        except Closed:
            return
        if self.bell is not None:
            self.bell.ring()

    # --- the loop end: the server thread only ---

    def take(self) -> C | None:
        """The next call that was sent."""
        if not self._sent():
            return None
        try:
            return self._take(False)
        except (Empty, Closed):
            return None

    def signal(self, call: C) -> None:
        """Tell the reader of a call that there is something to look at, unless a token is on its way already.

        It is woken by the queue's own condition, with the GIL kept.
        """
        if call.signalled:
            return
        call.signalled = True
        try:
            self._reply(call)
        except Closed:
            return
        if self.bell is not None:
            self.bell.ring()

    def close(self) -> list[C]:
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
