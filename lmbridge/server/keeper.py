"""Keeps one server thread: starts it on first use, replaces it if it is stuck, ends it once.

Rule: any thread. Whatever interrupts starting or ending it, there is at most one server thread.
"""

from __future__ import annotations

import _thread
import functools
import os
import threading

from lmbridge.crossing.channel import SLICE
from lmbridge.crossing.handle import ServerHandle
from lmbridge.crossing.status import Verdict
from lmbridge.errors import BridgeClosedError, EngineStartError
from lmbridge.log import logger, shown
from lmbridge.metrics import Metrics
from lmbridge.server import at_exit, places
from lmbridge.server.clock import LookClock
from lmbridge.server.environment import check_environment
from lmbridge.server.lodging import Lodging
from lmbridge.server.loop import ServerLoop
from lmbridge.server.losses import died
from lmbridge.server.run import Run
from lmbridge.server.supervisor import Supervisor
from lmbridge.server.swaps import STUCK, Recipe, Swaps
from lmbridge.server.watchdog import Watchdog

MARGIN = 2.0  # seconds for the thread itself to end, once its engines have
ARRIVAL = 0.2  # seconds for a thread possibly started elsewhere to arrive
STRUCK = "an exception was thrown into it as it ended"


class Keeper:
    """The life of one bridge's server thread.

    Attributes:
        run: the current run; None before the first.
        closed: nothing is started from now on.
    """

    def __init__(
        self, recipe: Recipe, handle: ServerHandle, metrics: Metrics, stall_timeout: float | None, lodging: Lodging
    ) -> None:
        self.swaps = Swaps()
        self.run: Run | None = None  # guarded by _lock when written, like the next two
        self.closed = False
        self._recipe = recipe
        self._handle = handle
        self._status = handle.status
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._lodging = lodging
        self._pid = os.getpid()
        self._locks = {self._pid: threading.RLock()}  # by process; the current one's:
        self._lock = self._locks[self._pid]  # reentrant: a signal handler may close during start

    @property
    def recipe(self) -> Recipe:
        """The recipe of the current or next engine."""
        return self._recipe if self.run is None else self.run.supervisor.recipe

    @property
    def started(self) -> bool:
        """Whether a server thread was started in this process."""
        return self.run is not None and not self._handle.forked

    # --- from start to end ---

    def check_process(self) -> None:
        """Raise ForkedError in a child of the server's process. Call this before taking any lock."""
        if self.run is not None:
            self._handle.check_process()
        elif self._pid != os.getpid():  # nothing had started: this process may start, with a fresh lock
            self._lock = self._locks.setdefault(os.getpid(), threading.RLock())  # one for all threads arriving at once
            self._handle.belong_here()
            self._pid = os.getpid()  # last: seeing it means that all is done

    def ensure(self) -> None:
        """Ensure that there is a server thread.

        Raises:
            LMBridgeError: there cannot be one: closed, ended, or in the wrong process or environment.
        """
        self.check_process()
        with self._lock:
            if self.closed and self.run is not None and self._status.state == "failed":
                raise self._handle.closed_error()
            if self.closed:
                raise BridgeClosedError("The bridge is closed; build a new one.")
            run = self.run
            if run is None:
                check_environment()
                run = self._adopt(self._new_run(self._recipe))
            if not run.taken:  # also if an exception struck the starting thread
                self._launch(run)

    def begin_with(self, recipe: Recipe) -> bool:
        """Replace the recipe of the first engine; False if it is too late.

        Raises:
            ForkedError: the server belongs to the parent process.
        """
        self.check_process()
        with self._lock:
            if self.run is not None or self.closed:
                return False
            self._recipe = recipe
            return True

    def close(self, drain: bool, timeout: float) -> None:
        """End the server and wait for its thread, at most ``timeout`` seconds plus some grace. Idempotent."""
        if self.run is not None and self._handle.forked:  # nothing runs in this process
            return
        self.check_process()
        with self._lock:
            self.closed = True
            run = self.run
            if run is None:
                self._status.state = "closed"
                return
            if run.take(None):
                self._end(run, BridgeClosedError("The bridge was closed before its server thread started."))
                run.discard()
                return
        run.call_soon(functools.partial(run.supervisor.stop, drain, timeout))
        thread = run.thread
        if thread is not None and thread is not threading.current_thread():
            self._wait_for_end(run, thread, timeout + places.CLOSE_GRACE + MARGIN)

    def drop(self) -> bool:
        """Make the server end at once; for finalizers: takes no lock, never waits. False: nothing was running."""
        run = self.run
        if run is None or self._handle.forked or self.closed:
            return False
        self.closed = True
        if run.take(None):
            run.discard()
            return False
        run.call_soon(functools.partial(run.supervisor.stop, False, 0.0))
        return True

    def _wait_for_end(self, run: Run, thread: threading.Thread, seconds: float) -> None:
        """Wait for the thread, or leave it behind after ``seconds``."""
        clock, passed = LookClock(), 0.0
        while not run.left_behind and passed < seconds:
            if run.gone.wait(min(SLICE, seconds - passed)):
                thread.join(SLICE)  # it is about to end
                break
            if not thread.is_alive():
                break
            passed = clock.look(SLICE)
        with self._lock:
            if thread.is_alive() and not run.gone.told:
                self._abandon(run)
            elif self._handle.ended is None:
                self._on_end(run, RuntimeError(STRUCK))

    # --- the thread ---

    def _new_run(self, recipe: Recipe, stuck: Run | None = None) -> Run:
        """A new run; changes no shared state."""
        loop = ServerLoop(self._handle, self._metrics, self._stall_timeout)
        return Run(loop, Supervisor(loop, recipe, self.swaps, self._lodging), stuck)

    def _adopt(self, run: Run) -> Run:
        """Make this the first run, unless a signal handler has meanwhile started one. With _lock held."""
        if self.run is None:  # no function call between this and the next line, so no handler either
            self.run = run
            self._handle.loop = run.loop.loop
        else:
            run.discard()
        return self.run

    def _launch(self, run: Run) -> None:
        """Start threads until one arrives; latecomers do nothing. With _lock held.

        ``Thread.start`` waits without limit for the new thread, and an exception thrown into its caller may strike the
        new thread first (CPython briefly gives both the same id). So another thread calls it.
        """
        if run.arrived is not None:  # a starter was interrupted while waiting for its thread
            run.arrived.wait(ARRIVAL)
        while not run.taken:
            run.arrived = arrived = Verdict()
            _thread.start_new_thread(self._start_thread, (run, arrived))
            arrived.wait(SLICE)
            if arrived.error is not None:
                raise arrived.error

    def _start_thread(self, run: Run, arrived: Verdict) -> None:
        try:
            threading.Thread(target=self._serve, args=(run, arrived), name="lmbridge server", daemon=True).start()
        except BaseException as error:  # the process may have run out of threads
            arrived.tell(error)

    def _serve(self, run: Run, arrived: Verdict) -> None:
        """The server thread's main function."""
        thread = threading.current_thread()
        taken = run.take(thread)
        if taken and self._status.state == "new":  # set here: the starter might overwrite "ready"
            self._status.loading()
        arrived.tell()
        if not taken:
            return
        at_exit.remember(self)
        cause: BaseException = RuntimeError(STRUCK)
        try:
            Watchdog(run, thread, self._stall_timeout, self._on_stuck, self._on_end).start()
            cause = run.serve()
        except BaseException as error:  # no other thread could be started
            cause = error
        finally:
            try:
                self._on_end(run, cause)
            finally:
                run.clear()
                run.gone.tell()

    # --- the end; the first caller does it ---

    def _on_end(self, run: Run, cause: BaseException) -> None:
        """The thread has ended: notify everyone, unless it was replaced."""
        with self._lock:
            if not run.left_behind:
                self._end(run, cause)

    def _on_stuck(self, run: Run) -> None:
        """Leave a stuck thread behind, and start a new one unless the bridge is closed."""
        with self._lock:
            if run is not self.run or run.left_behind or self._handle.ended is not None:
                return
            if self.closed:
                self._abandon(run)
                return
            stuck = run.describe_stuck()
            run.leave_behind()
            self.swaps.fail_begun(EngineStartError(STUCK))
            try:
                self.run = self._new_run(run.supervisor.recipe, run)
                self._status.lost(died(run.loop.loss))
                self._handle.loop = self.run.loop.loop
                self._launch(self.run)
            except BaseException as error:
                self._end(self.run, error)
        # Only now, without a lock: a log handler may be held by a thread that waits for us.
        logger.error("%s; it was left behind, and the engine is rebuilt on a new thread.", stuck)

    def _abandon(self, run: Run) -> None:
        """End everything without the thread, which did not end. With _lock held."""
        stuck = f"{run.describe_stuck()} and was left behind"
        first = not run.left_behind
        if self._handle.ended is None or not first:  # otherwise it is only slow to close the engine
            run.leave_behind()
            self._end(run, BridgeClosedError(f"The bridge was closed; its requests were aborted. {stuck}."))
            self._status.reason = stuck
        if first:
            logger.warning("%s.", stuck)

    def _end(self, run: Run, cause: BaseException) -> None:
        """End every call and swap, now and from now on. With _lock held; idempotent."""
        ended = self._handle.ended
        cause = ended or cause
        self.closed = True
        self._note_end(cause)
        self.swaps.fail_all(BridgeClosedError("The server thread ended before the new model was ready."))
        run.loop.calls.close(cause)
        self._lodging.end()
        if not self._status.ready.told:
            self._status.ready.tell(self._handle.closed_error())
        at_exit.forget(self)
        if not isinstance(cause, BridgeClosedError) and ended is None:
            logger.error("The server thread ended unexpectedly: %s", shown(cause))

    def _note_end(self, cause: BaseException) -> None:
        if isinstance(cause, BridgeClosedError):
            self._status.state, self._status.reason = "closed", ""
        else:
            self._status.state, self._status.reason = "failed", f"the server thread ended: {shown(cause)}"
