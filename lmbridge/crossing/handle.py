"""What callers hold of the server: its thread-safe face.

Rule: any thread but the server's; it does no more than put something where the server thread will look, and ring. One
handle serves a bridge for life, also when its server thread is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE, Channel, Closed, Empty
from lmbridge.crossing.channels import Channels
from lmbridge.crossing.doorbell import Doorbell
from lmbridge.crossing.endings import closed_error, timeout_error
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.status import Status, Verdict
from lmbridge.crossing.wake_chain import WakeChain
from lmbridge.engines.thread import give_way, loop_behind
from lmbridge.errors import ForkedError, LMBridgeError, WrongThreadError, fresh

T = TypeVar("T")

ASK_PATIENCE = 1.0  # seconds to wait for the loop's answer to a question

_forks = 0  # how many forks lie between the first process and this one: asking the system takes longer


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class ServerHandle:
    """Where callers and server thread of one bridge meet.

    Attributes:
        gate: bounded admission, and the book of all calls.
        channels: lent to callers.
        status: the engine's life as the server thread writes it.
        sent: channels with a call in them, one entry for each; any thread appends, the server thread takes.
        aborted: settled calls to be stopped; likewise.
        helpers: see to callers' own threads, now and then.
    """

    def __init__(self, gate: Gate, status: Status) -> None:
        self.gate = gate
        self.status = status
        self.wakes = WakeChain(self.ring)
        self.channels = Channels(self.wakes)
        self.sent: deque[Channel[Call]] = deque()
        self.aborted: deque[Call] = deque()
        self.helpers: list[weakref.WeakMethod[Callable[[], None]]] = []  # called at every sweep; appended by anyone
        self.bell = Doorbell()  # of the present loop; replaced by the server thread only, as are the next three
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread_id: int | None = None
        self.ended: BaseException | None = None  # why there is no server any more
        self._pid = os.getpid()
        self._forks = _forks

    # --- the process ---

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child process, whose thread does not exist."""
        return self._forks != _forks

    def check_process(self) -> None:
        """Raise ForkedError in a child of the process that the server runs in. Comes before every lock."""
        if self._forks != _forks:
            raise ForkedError(
                f"The bridge was started in process {self._pid}; its thread and model do not exist in this child. "
                "Build the Bridge after the fork (under gunicorn: in the worker, or without --preload)."
            )

    def check_thread(self) -> None:
        """Raise WrongThreadError on the server thread, which must not block, and on the engine's, whose work would wait
        for itself.
        """
        behind = loop_behind()
        if behind is not None and behind == self.thread_id:
            raise WrongThreadError(
                "This blocking call was made by what the bridge's own engine is computing, which would wait for itself "
                "forever. Call another bridge there, or this one from another thread."
            )
        if behind is not None:
            give_way()
        if threading.get_ident() == self.thread_id:
            raise WrongThreadError(
                "This blocking call was made on the server thread, which would wait for itself forever. "
                "Use its form for event loops (ainfer, aembed, acall …), or call from another thread."
            )

    def belong_here(self) -> None:
        """Take this process for the server's. Before the server has started only."""
        self._pid, self._forks = os.getpid(), _forks

    # --- the life of a call ---

    def send(self, call: Call, waiting: Channel[Call] | None = None) -> bool:
        """Have a new call admitted and send it; waits while the gate is full, at most to the call's deadline.

        False: it has ended before it was sent (its deadline, an order). Whatever this raises, the call has to be
        settled and aborted, but for a QueueFullError.

        Args:
            waiting: the channel to wait on, where the call's own has another reader.

        Raises:
            QueueFullError: there is no place and the bridge does not wait for one.
            LMBridgeError: the bridge or the client is closed.
        """
        if not self.gate.enter(call):
            self.check_owner(call)
            self._wait_for_place(call, waiting or call.channel)
        if call.owner.closed is not None:
            self.check_owner(call)
        if call.outcomes:
            return False
        self.submit(call)
        return True

    def check_owner(self, call: Call) -> None:
        """Raise what a call ends with whose owner is closed; to be asked once it is in the book.

        Whoever closes says so first and looks into the book then, so that no call slips through between the two.
        """
        closed = call.owner.closed
        if closed is not None:
            raise fresh(closed)

    def _wait_for_place(self, call: Call, channel: Channel[Call]) -> None:
        while not self.gate.stand(call, lambda: channel.nudge(call)) and not call.outcomes:
            remaining = self.remaining(call)
            if call.outcomes:
                break
            call.signalled = False
            with contextlib.suppress(Empty, Closed):  # who closes settles every call
                channel.wait(True, remaining)

    def submit(self, call: Call) -> None:
        """Send an admitted call to the loop.

        Raises:
            BridgeClosedError: the server has ended.
        """
        try:
            call.channel.send(call)
        except Closed:
            raise self.closed_error() from None
        self.sent.append(call.channel)
        if not self.bell.rung:
            self.wakes.ring()

    def abort(self, call: Call) -> None:
        """Have the server stop a call that has been settled. Takes no lock: finalizers use it."""
        self.aborted.append(call)
        self.bell.ring()

    def abort_where(self, chosen: Callable[[Call], bool], error: LMBridgeError) -> None:
        """End the calls that ``chosen`` picks, wherever they are, each with a copy of ``error``."""
        for call in list(self.gate.calls):
            if chosen(call) and call.settle(fresh(error)):
                self.abort(call)

    def remaining(self, call: Call) -> float | None:
        """Seconds to wait before looking at ``call`` again, None for the usual; settles it after its deadline."""
        deadline = call.request.deadline
        if deadline is None:
            return None
        remaining = deadline - time.monotonic()
        if remaining > SLICE:
            return None
        if remaining <= 0:
            self.expire(call)
            return 0.0
        return remaining

    def expire(self, call: Call) -> bool:
        """Settle a call whose deadline has passed; False when it has an outcome already."""
        if call.outcomes or not call.settle(timeout_error(call, self.status, self.gate.pending)):
            return False
        self.abort(call)
        return True

    def closed_error(self) -> LMBridgeError:
        """What a call ends with that finds the server gone."""
        return closed_error(self.ended or RuntimeError("the loop is not running"))

    # --- asking the loop ---

    def ring(self) -> None:
        """Have the server look at what was put down for it. Takes no lock."""
        self.bell.ring()

    def run_soon(self, function: Callable[[], None]) -> bool:
        """Run ``function`` on the loop; False when there is none to run it."""
        loop = self.loop
        if loop is None or self.ended is not None:
            return False
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:  # it has been closed
            return False
        return True

    def ask(self, question: Callable[[], T]) -> T | None:
        """What ``question`` finds on the server thread; None when there is none, or when the loop does not answer."""
        if threading.get_ident() == self.thread_id:
            return question()
        found: list[T] = []
        answered = Verdict()

        def ask() -> None:
            try:
                found.append(question())
            except BaseException as error:  # whatever an engine raises is the asker's
                answered.tell(error)
            else:
                answered.tell()

        if not self.run_soon(ask) or not answered.wait(ASK_PATIENCE):
            return None
        if answered.error is not None:
            raise answered.error
        return found[0]

    # --- the server thread only ---

    def attach(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
        """Say that this thread is the server's from now on, with this loop, which answers the bell so."""
        self.thread_id = threading.get_ident()
        self.loop = loop
        self.bell = Doorbell(answer, loop)
        self.wakes.attach(loop)
        self.bell.ring()

    def close(self, cause: BaseException) -> list[Call]:
        """Refuse what comes, with ``cause`` chained; the calls that lived are to be ended. The loop need not run."""
        self.ended = cause
        calls = self.gate.close(self.closed_error)
        for call in calls:
            call.settle(self.closed_error())
        for call in self.channels.close(self.closed_error):
            call.settle(self.closed_error())
        self.wakes.close()
        return calls
