"""The server thread's life: started when first needed, replaced when it is stuck, ended once.

Rule: callers' threads ask here for the server's handle and get it, or the reason why there is none.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import dataclasses
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from lmbridge.crossing.call import Call
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.handle import ServerHandle
from lmbridge.crossing.status import State, Status
from lmbridge.engines.base import Engine
from lmbridge.engines.standing import where_is
from lmbridge.errors import (
    BridgeClosedError,
    EngineStartError,
    InvalidRequestError,
    RequestTimeoutError,
    WrongThreadError,
    fresh,
)
from lmbridge.metrics import Metrics
from lmbridge.server.environment import check_environment
from lmbridge.server.loop import ServerLoop
from lmbridge.server.supervisor import CLOSE_GRACE, Recipe, Supervisor, Swap
from lmbridge.server.watchdog import LOOP_GRACE, Watchdog

logger = logging.getLogger("lmbridge")
T = TypeVar("T")

QUIET = 10.0  # seconds without progress after which health tells of it


class ServerThread:
    """Starts one server thread, looks after it and ends it.

    Attributes:
        handle: what callers hold of the server, whichever thread that is.
    """

    def __init__(self, recipe: Recipe, gate: Gate, metrics: Metrics, stall_timeout: float | None) -> None:
        self.metrics = metrics
        self._status = Status()  # as the server thread writes it
        self.handle = ServerHandle(gate, self._status)
        self._recipe = recipe
        self._stall_timeout = stall_timeout
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: ServerLoop | None = None  # guarded by _lock when written, as are the rest
        self._supervisor: Supervisor | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    # --- what can be seen, by anyone; waits for nobody ---

    @property
    def label(self) -> str:
        """What the present engine is called."""
        return (self._supervisor.recipe if self._supervisor is not None else self._recipe).label

    @property
    def started(self) -> bool:
        """Whether there has been a server thread in this process."""
        return self._loop is not None and not self.handle.forked

    @property
    def engine(self) -> Engine | None:
        """The engine that gets what comes now."""
        place = self._loop.calls.place if self._loop is not None and self.started else None
        return None if place is None else place.engine

    def living(self) -> list[Call]:
        """The calls that were made and have not ended, oldest first."""
        return list(self.handle.gate.calls) if self.started else []

    @property
    def silent(self) -> float:
        """Seconds since the server thread's last sign of life, of which it gives two a second; 0 without one."""
        if self._loop is None or not self.started or self._status.state == "closed":
            return 0.0
        return time.monotonic() - self._loop.sweep.heartbeat

    @property
    def status(self) -> Status:
        """The engine's life, seen to be true now: no state outlives what it needs."""
        loop, thread = self._loop, self._thread
        ended = thread is not None and not thread.is_alive()  # before the state, which the thread writes at its end
        told = self._status
        if loop is None or told.state in ("failed", "closed"):
            return told
        if self.handle.forked:
            return _seen(told, "failed", "the bridge was started in another process; build one in this process")
        if ended:
            return _seen(told, "failed", "the server thread has ended")
        return _as_it_stands(told, loop)

    # --- what callers ask for ---

    def server(self, blocking: bool) -> ServerHandle:
        """The running server's handle; starts it when this is the first call.

        Raises:
            ForkedError: the bridge was started in another process.
            BridgeClosedError: it was closed.
            WrongThreadError: ``blocking`` on the server thread.
        """
        handle = self.handle
        if self._loop is None or self._closed or handle.forked:
            self._start()
        if blocking and threading.get_ident() == handle.thread_id:
            raise WrongThreadError(
                "This blocking call was made on the server thread, which would wait for itself forever. "
                "Use await bridge.ainfer(...), or call from another thread."
            )
        return handle

    def check_process(self) -> None:
        """Raise ForkedError in a child of the process that started the server. Comes before every lock."""
        if self._loop is not None:
            self.handle.check_process()
        elif self._pid != os.getpid():  # nothing had started: this process may begin anew, with a lock nobody holds
            self._pid = os.getpid()
            self._lock = threading.Lock()
            self.handle.belong_here()

    def ask_engine(self, question: Callable[[Engine], T]) -> T | None:
        """What ``question`` finds on the server thread; None without an engine, or when the loop does not answer."""
        if not self.started:
            return None
        return self.handle.ask(lambda: None if (engine := self.engine) is None else question(engine))

    # --- from start to end ---

    def start(self, timeout: float | None) -> None:
        """Start, and block until the engine is ready.

        Raises:
            EngineStartError: it could not be loaded.
            RequestTimeoutError: it was not ready in time; loading goes on.
        """
        self.server(blocking=True)
        try:
            error = self._status.ready.exception(timeout)
        except concurrent.futures.TimeoutError:
            raise RequestTimeoutError(f"The engine was not ready after {timeout} s; it goes on loading.") from None
        if error is not None:
            raise fresh(error)

    def swap(self, recipe: Recipe, overlap: bool, timeout: float | None) -> None:
        """Exchange the engine and block until the new one has the place.

        Raises:
            EngineStartError: it could not be loaded; the old one goes on.
            RequestTimeoutError: ``overlap=False``, and what runs did not finish in time; the old one goes on.
            InvalidRequestError: ``overlap=False``, and the old engine could not be brought back after a failed load.
        """
        self.check_process()
        with self._lock:
            if self._loop is None and not self._closed:
                self._recipe = recipe
                return
        server = self.server(blocking=True)
        supervisor = self._supervisor
        assert supervisor is not None
        if not overlap and not supervisor.recipe.rebuildable:
            raise InvalidRequestError(
                "overlap=False frees the old model first, and one given as an instance could not be brought back if "
                "the new one failed to load; use overlap=True, or build the Bridge from a factory.",
                "overlap",
            )
        request = Swap(recipe, overlap, timeout)
        server.run_soon(functools.partial(supervisor.swap, request))
        error = request.done.exception()
        if error is not None:
            raise fresh(error)

    def close(self, drain: bool, timeout: float) -> None:
        """End the server and wait for its thread, at most ``timeout`` seconds and some grace. Idempotent."""
        if self._loop is not None and self.handle.forked:  # nothing of it runs here
            return
        with self._lock:
            self._closed = True
        self._request_stop(drain, timeout)
        thread = self._thread
        if thread is None:
            self._status.state = "closed"
        elif threading.current_thread() is not thread:
            thread.join(timeout + CLOSE_GRACE + 1.0)
            if thread.is_alive():
                logger.warning("%s; it is left behind.", describe_stuck(thread))

    def drop(self) -> bool:
        """Have the server end at once; for finalizers: takes no lock and waits for nobody. False: nothing ran."""
        if not self.started or self._closed:
            return False
        self._closed = True
        self._request_stop(False, 0.0)
        return True

    def _request_stop(self, drain: bool, timeout: float) -> None:
        if self._supervisor is not None:
            self.handle.run_soon(functools.partial(self._supervisor.stop, drain, timeout))

    # --- the thread ---

    def _start(self) -> None:
        self.check_process()
        with self._lock:
            if self._closed and self._loop is not None and self._status.state == "failed":
                raise self.handle.closed_error()
            if self._closed:
                raise BridgeClosedError("The bridge is closed; build a new one.")
            if self._loop is None:
                check_environment()
                self._loop = self._launch(self._recipe, None)
                _started.add(self)

    def _launch(self, recipe: Recipe, stuck: ServerLoop | None) -> ServerLoop:
        """A loop on a new thread. With _lock held."""
        self._status.state = "starting"
        server = ServerLoop(self.handle, self.metrics, self._stall_timeout)
        self.handle.loop = server.loop
        self._supervisor = Supervisor(server, recipe)
        thread = threading.Thread(
            target=self._run, args=(server, self._supervisor, stuck), name="lmbridge server", daemon=True
        )
        thread.start()
        self._thread = thread  # not before it runs: one that does not is taken for dead
        if self._stall_timeout is not None:
            Watchdog(server, thread, self._stall_timeout, self._replace).start()
        return server

    def _run(self, server: ServerLoop, supervisor: Supervisor, stuck: ServerLoop | None) -> None:
        """The server thread, from its first to its last moment."""
        cause: BaseException = BridgeClosedError("The bridge was closed; its requests were aborted.")
        try:
            server.open(stuck)
            server.loop.run_until_complete(supervisor.run(after_death=None if stuck is None else stuck.loss))
        except BaseException as error:  # the loop was stopped from outside, or something was thrown in
            cause = error
            if not server.calls.left_behind:
                logger.error("The server thread ended unexpectedly: %r", error)
        finally:
            supervisor.fail_swaps(BridgeClosedError("The server thread ended before the new model was ready."))
            if not server.calls.left_behind:
                self._closed = True
                self._note_end(cause)
                server.calls.close(cause)
                if not self._status.ready.done():
                    self._status.ready.set_exception(self.handle.closed_error())
                _started.discard(self)
            _close_loop(server.loop)

    def _note_end(self, cause: BaseException) -> None:
        if isinstance(cause, BridgeClosedError):
            self._status.state, self._status.reason = "closed", ""
        else:
            self._status.state, self._status.reason = "failed", f"the server thread ended: {cause!r}"

    def _replace(self, stuck: ServerLoop, thread: threading.Thread) -> None:
        """Leave a stuck server thread behind and go on with a new one. Called by the watchdog."""
        with self._lock:
            if self._closed or self._loop is not stuck or self._supervisor is None:
                return
            logger.error("%s; it is left behind, and the engine is rebuilt on a new thread.", describe_stuck(thread))
            place = where_is(thread.ident) or "unknown code"
            stuck.loss = TimeoutError(f"the engine blocked the server thread, which was stuck in {place}")
            stuck.calls.left_behind = True
            self.handle.run_soon(stuck.loop.stop)
            self._supervisor.fail_swaps(EngineStartError("The server thread was stuck; ask for the swap again."))
            self._loop = self._launch(self._supervisor.recipe, stuck)


def describe_stuck(thread: threading.Thread) -> str:
    """Names a stuck thread and the place where it is stuck."""
    return f"The thread {thread.name!r} is stuck in {where_is(thread.ident) or 'unknown code'}"


def _as_it_stands(told: Status, server: ServerLoop) -> Status:
    """What is told of a server whose thread lives, as far as it holds: it may be stuck, its engine dead or silent."""
    now, place = time.monotonic(), server.calls.place
    silent = now - server.sweep.heartbeat
    if silent > LOOP_GRACE and told.state in ("starting", "ready", "restarting"):
        state: State = "restarting" if told.state == "ready" else told.state
        where = where_is(server.handle.thread_id) or "unknown code"
        return _seen(told, state, f"the server thread has not answered for {silent:.0f} s; it stands in {where}")
    if told.state != "ready" or place is None:
        return told
    if place.dead.done():
        return _seen(told, "restarting", f"the engine died: {place.dead.result()!r}")
    if (quiet := place.standstill(now)) > QUIET:
        standing = place.where()
        return _seen(
            told, "ready", f"the engine has made no progress for {quiet:.0f} s" + (f"; {standing}" if standing else "")
        )
    return told


def _seen(told: Status, state: State, reason: str) -> Status:
    return dataclasses.replace(told, state=state, reason=reason)


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what an engine left on the loop, and close it."""
    try:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except BaseException:
        logger.debug("Leftovers on the loop would not end.", exc_info=True)
    finally:
        loop.close()


_started: weakref.WeakSet[ServerThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the bridges nobody closed; by now no non-daemon thread runs that could use them."""
    for server in list(_started):
        if server.started:
            logger.warning("A Bridge was not closed; use `with Bridge(...)` or bridge.close().")
            server.close(drain=False, timeout=0.0)
