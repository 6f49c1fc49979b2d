"""The callers' thread-safe interface to the server.

Rule: any thread but the server's; it only puts things where the server thread will look, and rings. One handle serves a
bridge for life, even when its server thread is replaced.
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

ASK_PATIENCE = 1.0  # seconds to wait for an answer from the loop

_forks = 0  # forks between the first process and this one: faster than asking the system


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class ServerHandle:
    """Where callers and the server thread of one bridge meet.

    Attributes:
        gate: bounded admission, and the registry of all calls.
        channels: lent to callers.
        status: the engine's state, written by the server thread.
        sent: channels with a sent call, one entry per call; any thread appends, the server thread pops.
        aborted: settled calls to stop; likewise.
        helpers: maintain callers' own threads now and then.
    """

    def __init__(self, gate: Gate, status: Status) -> None:
        self.gate = gate
        self.status = status
        self.wakes = WakeChain(self.ring)
        self.channels = Channels(self.wakes)
        self.sent: deque[Channel[Call]] = deque()
        self.aborted: deque[Call] = deque()
        self.helpers: list[weakref.WeakMethod[Callable[[], None]]] = []  # called at every sweep; any thread appends
        self.bell = Doorbell()  # of the current loop; replaced by the server thread only, like the next three
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread_id: int | None = None
        self.ended: BaseException | None = None  # why the server has ended
        self._pid = os.getpid()
        self._forks = _forks

    # --- the process ---

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child, where the server thread does not exist."""
        return self._forks != _forks

    def check_process(self) -> None:
        """Raise ForkedError in a child of the server's process. Call this before taking any lock."""
        if self._forks != _forks:
            raise ForkedError(
                f"The bridge was started in process {self._pid}; its thread and model do not exist in this child. "
                "Build the Bridge after the fork (under gunicorn: in the worker, or without --preload)."
            )

    def check_thread(self) -> None:
        """Raise WrongThreadError on the server thread, which must not block, or inside the engine: a deadlock."""
        behind = loop_behind()
        if behind is not None and behind == self.thread_id:
            raise WrongThreadError(
                "This blocking call was made inside the bridge's own engine, which would wait for itself forever. Call "
                "another bridge there, or call this one from another thread."
            )
        if behind is not None:
            give_way()
        if threading.get_ident() == self.thread_id:
            raise WrongThreadError(
                "This blocking call was made on the server thread, which would wait for itself forever. "
                "Use the async form (ainfer, aembed, acall …), or call from another thread."
            )

    def belong_here(self) -> None:
        """Make this the server's process. Only before the server has started."""
        self._pid, self._forks = os.getpid(), _forks

    # --- the life of a call ---

    def send(self, call: Call, waiting: Channel[Call] | None = None) -> bool:
        """Have a new call admitted and send it; waits while the gate is full, at most until the call's deadline.

        False: the call ended before it was sent (by its deadline or an abort). On any exception except QueueFullError,
        the call must be settled and aborted.

        Args:
            waiting: the channel to wait on, if the call's own has another reader.

        Raises:
            QueueFullError: there is no room, and the bridge rejects.
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
        """Raise the closing error of the call's owner, if any; call this once the call is registered.

        The closer sets the error first and then looks through the registry, so no call slips through in between.
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
            with contextlib.suppress(Empty, Closed):  # closing settles every call
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
        """Make the server stop a settled call. Takes no lock: finalizers use it."""
        self.aborted.append(call)
        self.bell.ring()

    def abort_where(self, chosen: Callable[[Call], bool], error: LMBridgeError) -> None:
        """End every call that ``chosen`` picks with a copy of ``error``."""
        for call in list(self.gate.calls):
            if chosen(call) and call.settle(fresh(error)):
                self.abort(call)

    def remaining(self, call: Call) -> float | None:
        """Seconds until ``call`` needs checking again, None for the default; settles it after its deadline."""
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
        """Settle a call whose deadline has passed; False if it already has an outcome."""
        if call.outcomes or not call.settle(timeout_error(call, self.status, self.gate.pending)):
            return False
        self.abort(call)
        return True

    def closed_error(self) -> LMBridgeError:
        """The error of a call when the server is gone."""
        return closed_error(self.ended or RuntimeError("the loop is not running"))

    # --- asking the loop ---

    def ring(self) -> None:
        """Make the server look at its inbox. Takes no lock."""
        self.bell.ring()

    def run_soon(self, function: Callable[[], None]) -> bool:
        """Run ``function`` on the loop; False if there is no loop."""
        loop = self.loop
        if loop is None or self.ended is not None:
            return False
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:  # it has been closed
            return False
        return True

    def ask(self, question: Callable[[], T]) -> T | None:
        """The result of ``question`` on the server thread; None if there is none or the loop does not answer."""
        if threading.get_ident() == self.thread_id:
            return question()
        found: list[T] = []
        answered = Verdict()

        def ask() -> None:
            try:
                found.append(question())
            except BaseException as error:  # whatever an engine raises goes to the asker
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
        """Make the current thread the server's, with this loop, which answers the bell with ``answer``."""
        self.thread_id = threading.get_ident()
        self.loop = loop
        self.bell = Doorbell(answer, loop)
        self.wakes.attach(loop)
        self.bell.ring()

    def close(self, cause: BaseException) -> list[Call]:
        """Refuse new calls, with ``cause`` chained; returns the calls to end. The loop need not run."""
        self.ended = cause
        calls = self.gate.close(self.closed_error)
        for call in calls:
            call.settle(self.closed_error())
        for call in self.channels.close(self.closed_error):
            call.settle(self.closed_error())
        self.wakes.close()
        return calls
