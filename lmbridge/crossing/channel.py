"""The channel between a caller and the server thread: a pair of janus queues, and a doorbell.

Rule: the only module that imports janus. A call goes in through ``Channel.requests``, and each token that comes back
through ``Channel.replies`` names it; generated text waits on the call itself, so a slow reader costs one token, not one
per engine step.

Theory of operation:

1. A channel serves one consumer at a time: a thread in a call, the dispatcher of futures, or another event loop.
2. Nobody awaits a queue: each put would cost a ``call_soon_threadsafe`` and a task. Instead, a put rings one doorbell
   for all channels, and the loop drains them without waiting.
3. Both ends use janus' sync side: an unbounded put never blocks there. The async side binds itself to its first loop,
   but our queues may have to outlive a stuck loop that was left behind.
4. Tokens are hints. The reader looks at the call that the token names, so late, duplicate or foreign tokens do no harm.
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
    """Goes through a channel. ``signalled``: a token naming it is on its way; the reader clears it."""

    signalled: bool


T = TypeVar("T")
C = TypeVar("C", bound=Named)
TRIED = "2.0.0"  # the tested version of janus; setup.cfg has the bounds
SLICE = 1.0  # seconds after which a waiter looks again: a lost wake-up costs this much, not a caller
LOCKS = ("_sync_mutex", "_sync_not_empty", "_sync_not_full", "_sync_tasks_done")  # all locks of a janus queue


def _check_janus() -> None:
    """Check that a janus queue has exactly the locks replaced here.

    Raises:
        MissingDependencyError: it does not, so a badly timed Ctrl-C could leave one locked forever.
    """
    kinds = (type(threading.Lock()), _thread.RLock, threading.Condition)
    try:
        _ = janus.SyncQueueEmpty, janus.SyncQueueShutDown
        found = {name for name, value in vars(janus.Queue()).items() if isinstance(value, kinds)}
        changes = [f"Queue.{name} is {'new' if name in found else 'gone'}" for name in sorted(found ^ set(LOCKS))]
    except Exception as error:  # older versions need a running loop and have no shutdown
        changes = [f"{type(error).__name__}: {error}"]
    if changes:
        raise MissingDependencyError(
            f"janus {getattr(janus, '__version__', '(unknown version)')} differs from the tested version {TRIED} "
            f"({', '.join(changes)}), so its queues could deadlock. Run: pip install 'janus>=2.0,<2.1', or install a "
            "newer lmbridge."
        )


_check_janus()
Empty = janus.SyncQueueEmpty
Closed = janus.SyncQueueShutDown


class _Condition(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """A janus queue's lock and condition in one, safe against exceptions thrown into a waiting thread.

    Ctrl-C and ``PyThreadState_SetAsyncExc`` strike between any two bytecodes. ``threading.Condition`` acquires and
    releases its lock in Python functions, so an exception inside them leaves the lock held or releases another
    thread's; the server thread was seen to hang within seconds. Here each step is one call into C, and the interpreter
    checks for such exceptions only after it, inside the ``try`` or ``with`` that undoes the step.
    """

    __slots__ = ("_wakes", "_waiters", "_spare")

    def __init__(self, wakes: WakeChain | None) -> None:
        self._wakes = wakes
        self._waiters: list[threading.Lock] = []  # guarded by the lock itself, like the next
        self._spare: threading.Lock | None = None  # an earlier waiter, held, for reuse

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait to be notified, acquire it again. False after ``timeout`` seconds.

        Raises:
            Empty: there is no timeout, and nothing came for a second; the waiter then looks again.
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
        if notified:  # otherwise another thread may have released it
            self._spare = waiter
        elif timeout is None:
            raise Empty
        return notified

    def notify(self) -> None:
        """Wake the longest-waiting thread."""
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
    """An unbounded janus queue whose sync side is safe to interrupt.

    Its locks, whose names janus does not document, are replaced by ours; nothing else is touched.
    """

    def __init__(self, wakes: WakeChain | None = None) -> None:
        super().__init__()
        lock = _Condition(wakes)
        for name in LOCKS:  # not through __dict__, which would slow every later attribute access
            setattr(self, name, lock)


class Channel(Generic[C]):
    """One consumer's pair of janus queues.

    ``bell`` is set if the consumer is an event loop, which must be woken, not blocked.

    Attributes:
        send: put a call in, from the caller's end; never blocks; raises ``Closed``.
        wait: ``wait(True, timeout)`` blocks for the next token at the caller's end, at most ``timeout`` seconds (>= 0;
            None: one second); raises ``Empty`` if none came, ``Closed`` if none can come.
    """

    __slots__ = ("requests", "replies", "bell", "send", "wait", "_sent", "_take", "_reply", "__weakref__")

    def __init__(self, bell: Doorbell | None = None, wakes: WakeChain | None = None) -> None:
        self.requests: _Queue[C] = _Queue()
        self.replies: _Queue[C] = _Queue(wakes)
        self.bell = bell
        # janus' own methods, unwrapped: a wrapper call would add a tenth to a request's cost.
        self.send = self.requests.sync_q.put
        self.wait = self.replies.sync_q.get
        self._sent = self.requests.sync_q.qsize
        self._take = self.requests.sync_q.get
        self._reply = self.replies.sync_q.put

    # --- the caller's end: any thread but the server's ---

    def nudge(self, call: C) -> None:
        """Wake the consumer from any thread; takes a lock, so not for finalizers or signal handlers."""
        try:
            self.replies.sync_q.put(call)
        except Closed:
            return
        if self.bell is not None:
            self.bell.ring()

    # --- the loop end: the server thread only ---

    def take(self) -> C | None:
        """The next sent call."""
        if not self._sent():
            return None
        try:
            return self._take(False)
        except (Empty, Closed):
            return None

    def signal(self, call: C) -> None:
        """Send the reader of a call a token, unless one is already on its way.

        The queue's own condition wakes it, without releasing the GIL.
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
        """Refuse further calls, wake the consumer, and return the calls not taken. The loop need not run."""
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
