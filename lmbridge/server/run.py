"""One run of the server: a loop, its supervisor, and the thread that runs them.

Rule: created by whoever starts the server, taken and run by exactly one thread; other rules at each method.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from lmbridge.crossing.status import Verdict
from lmbridge.engines.standing import where_is
from lmbridge.errors import BridgeClosedError
from lmbridge.log import logger
from lmbridge.server.loop import ServerLoop
from lmbridge.server.supervisor import Supervisor

LEFTOVERS = 1.0  # seconds for tasks that an engine left on the loop to end


class Run:
    """One server thread's run, from start to end.

    Args:
        stuck: the previous run, which was left behind.

    Attributes:
        arrived: told by the last thread that was started for it; its keeper's only.
        gone: told by its thread at the very end. ``Thread.join`` cannot replace it: in CPython 3.11, once Ctrl-C has
            struck a joining thread, a living thread counts as dead.
    """

    def __init__(self, loop: ServerLoop, supervisor: Supervisor, stuck: Run | None = None) -> None:
        self.loop = loop
        self.supervisor = supervisor
        self.arrived: Verdict | None = None
        self.gone = Verdict()
        self._stuck = stuck
        self._takers: list[threading.Thread | None] = []  # any thread appends; the first counts
        self._life: asyncio.Task[None] | None = None  # its thread only; None once it ended by itself

    # --- any thread ---

    def take(self, taker: threading.Thread | None) -> bool:
        """Become the thread that runs this, or with None prevent that; False if another was first. Takes no lock.

        So any number of threads may be started for it: the first to arrive is the server.
        """
        self._takers.append(taker)
        return self._takers[0] is taker

    @property
    def taken(self) -> bool:
        """Whether a thread has taken it."""
        return bool(self._takers)

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that took it."""
        return self._takers[0] if self._takers else None

    @property
    def left_behind(self) -> bool:
        """Whether it was stuck and has been replaced."""
        return self.loop.calls.left_behind

    def leave_behind(self) -> None:
        """Make the stuck thread end silently if it ever wakes up."""
        self.loop.loss = TimeoutError(f"the engine blocked the server thread, which was stuck in {self._where()}")
        self.loop.calls.left_behind = True
        self._move_out()
        self.call_soon(self.loop.loop.stop)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the loop, or not at all if that is closed. Takes no lock."""
        try:
            self.loop.loop.call_soon_threadsafe(function)
        except RuntimeError:
            return

    def describe_stuck(self) -> str:
        """Names the thread and where it is stuck."""
        name = "" if self.thread is None else f" {self.thread.name!r}"
        return f"The thread{name} is stuck in {self._where()}"

    def _where(self) -> str:
        return where_is(None if self.thread is None else self.thread.ident) or "unknown code"

    # --- the thread that took it ---

    def serve(self) -> BaseException:
        """Run to the end; returns the reason."""
        stuck, self._stuck = self._stuck, None
        try:
            self.loop.open(None if stuck is None else stuck.loop)
            self._life = self.loop.loop.create_task(self.supervisor.run(None if stuck is None else stuck.loop.loss))
            self.loop.loop.run_until_complete(self._life)
            self._life = None
        except BaseException as error:  # the loop was stopped from outside, or an exception was thrown in
            return error
        return BridgeClosedError("The bridge was closed; its requests were aborted.")

    def clear(self) -> None:
        """Close remaining engines, cancel their leftover tasks, and close the loop. Every call has ended."""
        loop = self.loop.loop
        try:
            if self._life is not None:
                self._life.cancel()
                loop.run_until_complete(self.supervisor.close_engines())
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            tasks.add(loop.create_task(loop.shutdown_asyncgens()))
            loop.run_until_complete(asyncio.wait(tasks, timeout=LEFTOVERS))
        except BaseException:
            logger.debug("Leftover tasks on the loop did not end.", exc_info=True)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the loop of a run that no thread took."""
        self._move_out()
        self.loop.loop.close()

    def _move_out(self) -> None:
        """Free its engines' share of their devices, whether or not they have released it. Any thread."""
        for place in list(self.loop.sweep.places):
            place.move_out()
