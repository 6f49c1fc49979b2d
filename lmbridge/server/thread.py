"""The callers' interface to the server thread: handle, status, start, swap, close.

Rule: any thread; blocking methods refuse the server thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import SLICE
from lmbridge.crossing.gate import Gate
from lmbridge.crossing.handle import ServerHandle
from lmbridge.crossing.status import Status
from lmbridge.engines.base import Engine, engine_error
from lmbridge.errors import InvalidRequestError, RequestTimeoutError, fresh
from lmbridge.log import shown
from lmbridge.metrics import Metrics
from lmbridge.server import health, watchdog
from lmbridge.server.border import name_of
from lmbridge.server.keeper import Keeper
from lmbridge.server.lodging import Lodging, Terms
from lmbridge.server.swaps import Recipe, Swap

T = TypeVar("T")


class ServerThread:
    """The server of one bridge, whichever thread currently runs it.

    Attributes:
        handle: the callers' interface.
        keeper: starts and ends the thread.
    """

    def __init__(
        self, recipe: Recipe, gate: Gate, metrics: Metrics, stall_timeout: float | None, terms: Terms | None = None
    ) -> None:
        self.metrics = metrics
        self._status = Status()  # written by the server thread
        self.handle = ServerHandle(gate, self._status)
        lodging = Lodging(terms or Terms(), self._status, gate)
        self.keeper = Keeper(recipe, self.handle, metrics, stall_timeout, lodging)

    # --- inspection, by anyone; never blocks ---

    @property
    def label(self) -> str:
        """The current engine's label."""
        return self.keeper.recipe.label

    @property
    def started(self) -> bool:
        """Whether a server thread was started in this process."""
        return self.keeper.started

    @property
    def engine(self) -> Engine | None:
        """The engine that gets new calls."""
        run = self.keeper.run
        place = run.loop.calls.place if run is not None and self.started else None
        return None if place is None else place.engine

    def living(self) -> list[Call]:
        """All unfinished calls, oldest first."""
        return list(self.handle.gate.calls) if self.started else []

    @property
    def silent(self) -> float:
        """Seconds since the server thread's last heartbeat (it sends two a second); 0 without a thread."""
        run = self.keeper.run
        if run is None or not self.started or self._status.state == "closed":
            return 0.0
        return health.silence(run)

    @property
    def status(self) -> Status:
        """The engine's state as observed now."""
        return health.seen(self._status, self.keeper.run, self.handle.forked)

    # --- requests from callers ---

    def server(self, blocking: bool) -> ServerHandle:
        """The running server's handle; the first call starts it.

        Raises:
            ForkedError: the bridge was started in another process.
            BridgeClosedError: it was closed.
            WrongThreadError: ``blocking`` on the server thread.
        """
        handle = self.handle
        if handle.thread_id is None or self.keeper.closed or handle.forked:
            self.keeper.ensure()
        if blocking:
            handle.check_thread()
        return handle

    def ask_engine(self, question: Callable[[Engine], T]) -> T | None:
        """The result of ``question`` on the server thread; None without an engine or if the loop does not answer."""
        if not self.started:
            return None
        return self.handle.ask(lambda: None if (engine := self.engine) is None else _ask(engine, question))

    # --- from start to end ---

    def start(self, timeout: float | None) -> None:
        """Start, and block until the engine is ready.

        Raises:
            EngineStartError: it could not be loaded.
            RequestTimeoutError: it was not ready in time; loading continues.
            BridgeClosedError: the bridge was closed meanwhile.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self.server(blocking=True)
            if self._status.state == "unloaded" and self.keeper.run is not None:
                self.keeper.run.call_soon(self.keeper.run.supervisor.load_again)
            ready, left = self._status.ready, SLICE if end is None else end - time.monotonic()
            if ready.wait(min(left, SLICE)):
                break
            if left <= 0:
                raise RequestTimeoutError(f"The engine was not ready after {timeout} s; loading continues.")
        if ready.error is not None:
            raise fresh(ready.error)

    def swap(self, recipe: Recipe, overlap: bool, timeout: float | None) -> None:
        """Swap the engine and block until the new one serves.

        Raises:
            EngineStartError: it could not be loaded; the old one keeps serving.
            RequestTimeoutError: with ``overlap=False``, running calls did not finish in time; or the server thread is
                stuck and did not begin the swap. The old engine is kept.
            InvalidRequestError: with ``overlap=False``, the old engine could not be reloaded after a failure.
            BridgeClosedError: the bridge was closed meanwhile.
        """
        if self.keeper.begin_with(recipe):
            return
        self.server(blocking=True)
        self._check_way_back(overlap)
        swap, swaps = Swap(recipe, overlap, timeout), self.keeper.swaps
        swaps.ask(swap)
        try:
            self._call_supervisor()
            while not swap.done.wait(SLICE):
                self._look_after(swap)
        except BaseException:
            swaps.withdraw(swap)
            raise
        if swap.done.error is not None:
            raise fresh(swap.done.error)

    def close(self, drain: bool, timeout: float) -> None:
        """End the server and wait for its thread, at most ``timeout`` seconds plus some grace. Idempotent."""
        self.keeper.close(drain, timeout)

    def drop(self) -> bool:
        """Make the server end at once; for finalizers: takes no lock, never waits. False: nothing was running."""
        return self.keeper.drop()

    # --- a swap under way ---

    def _check_way_back(self, overlap: bool) -> None:
        if not overlap and not self.keeper.recipe.rebuildable:
            raise InvalidRequestError(
                "overlap=False frees the old model first, but a model given as an instance could not be reloaded if "
                "the new one failed. Use overlap=True, or build the Bridge with a function that builds the engine.",
                "overlap",
            )

    def _call_supervisor(self) -> None:
        """Notify the current supervisor of a requested swap."""
        run = self.keeper.run
        if run is not None:
            run.call_soon(run.supervisor.look)

    def _look_after(self, swap: Swap) -> None:
        """Raise if a swap cannot happen; called once a second."""
        if self.handle.ended is not None:
            raise self.handle.closed_error()
        if not self.keeper.swaps.waits(swap):  # it is under way
            return
        silent = self.silent
        if silent > 2 * watchdog.LOOP_GRACE and self.keeper.swaps.withdraw(swap):
            raise RequestTimeoutError(
                f"The server thread has not answered for {silent:.0f} s, so the swap did not begin and the old model "
                "stays. Check health() to see where it is stuck, and swap again once it answers."
            )
        self._call_supervisor()


def _ask(engine: Engine, question: Callable[[Engine], T]) -> T:
    try:
        return question(engine)
    except Exception:
        raise
    except BaseException as cause:  # an engine that exits must not end the asker
        raise engine_error(f"The engine {name_of(engine)} could not answer: {shown(cause)}.", cause) from cause
