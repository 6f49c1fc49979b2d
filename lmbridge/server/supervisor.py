"""The engine's life: loads, monitors, rebuilds, swaps and closes it.

Rule: server thread only. The coroutine ``run`` is the whole life; the other methods are its parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import Any

from lmbridge.engines.ailments import is_sticky
from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineStartError, LMBridgeError, RequestTimeoutError
from lmbridge.log import logger, said
from lmbridge.server.lodging import Lodging
from lmbridge.server.loop import ServerLoop
from lmbridge.server.losses import died, not_again, start_error, swap_error
from lmbridge.server.place import Place
from lmbridge.server.places import Places
from lmbridge.server.rest import Rest
from lmbridge.server.swaps import STUCK, Recipe, Swap, Swaps

MAX_FAILURES = 3  # after this many losses within FAILURE_WINDOW seconds the engine stays down
FAILURE_WINDOW = 300.0
FIRST_BACKOFF = 0.1  # seconds before the first rebuild; each further one waits four times longer, up to
LAST_BACKOFF = 60.0


class Supervisor:
    """Keeps one engine running until told to stop.

    Attributes:
        recipe: of the current or next engine. Read by anyone.
    """

    def __init__(self, server: ServerLoop, recipe: Recipe, swaps: Swaps, lodging: Lodging) -> None:
        self.recipe = recipe
        self._handle = server.handle
        self._loop = server.loop
        self._sweep = server.sweep
        self._places = Places(server.sweep.places, lodging)
        self._calls = server.calls
        self._status = server.handle.status
        self._swaps = swaps
        self._called = asyncio.Event()  # set to stop, swap, unload or reload
        self._rest = Rest(lodging, self._calls, self._look_soon)
        lodging.label, lodging.host = recipe.label, self
        self._drained: asyncio.Future[None] | None = None

    # --- requests from others ---

    def stop(self, drain: bool, timeout: float) -> None:
        """End ``run``: at once, or (``drain``) after all calls have ended, at most ``timeout`` seconds later.

        Until then everything continues, including loads, rebuilds and swaps.
        """
        if self._over:
            return
        self._status.drains()
        if not drain or timeout <= 0:
            self._stop_now()
            return
        self._loop.call_later(timeout, self._stop_now)
        if self._drained is None:
            self._drained = asyncio.ensure_future(self._calls.drained())
            self._drained.add_done_callback(lambda drained: self._stop_now())

    def look(self) -> None:
        """Check for swaps and other requests."""
        self._called.set()

    def _look_soon(self) -> None:
        """The same, from any thread: the thread that ends the server may end the last call."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.look)

    def load_again(self) -> None:
        """Reload an unloaded model."""
        self._rest.want()

    def ask_to_rest(self, why: str) -> None:
        """Unload the model if it is idle. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the model with it
            self._loop.call_soon_threadsafe(self._rest.ask, why)

    # --- from beginning to end ---

    async def run(self, after_death: BaseException | None = None) -> None:
        """The whole life. ``after_death``: why the previous server thread's engine was lost."""
        sweep = asyncio.ensure_future(self._sweep.run())
        try:
            place = await (self._open() if after_death is None else self._rebuild(after_death, died(after_death)))
            while not self._stopped:
                await self._until_called(place)
                if not self._stopped:
                    place = await self._see_to(place)
            await self.close_engines()
        finally:
            sweep.cancel()

    async def _see_to(self, place: Place | None) -> Place | None:
        """Handle pending requests; returns the engine that serves then."""
        if self._swaps:
            return await self._exchange(place)
        if place is None:
            return await self._come_back() if self._rest.wanted else None
        if place.dead.done():
            return await self._replace(place)
        why = self._rest.due()
        return await self._unload(place, why) if why else place

    async def close_engines(self) -> None:
        """Close all remaining engines, concurrently."""
        await self._places.close_all()

    @property
    def _stopped(self) -> bool:
        return self._places.stop.is_set()

    @property
    def _over(self) -> bool:
        """Whether to stop: told to, ended by others, or replaced."""
        return self._stopped or self._handle.ended is not None or self._calls.left_behind

    def _stop_now(self) -> None:
        """End every call before closing the engines, which may be slow."""
        if self._over:
            return
        self._places.stop.set()
        self._called.set()
        self._swaps.fail_all(BridgeClosedError("The bridge was closed before the new model was ready."))
        self._calls.end_all(BridgeClosedError("The bridge was closed; its requests were aborted."))

    # --- loading ---

    async def _open(self) -> Place | None:
        """The first engine, installed; None if it could not be loaded, or not now."""
        try:
            place = await self._load(self.recipe)
        except Exception as cause:
            self._stay_down(start_error(cause))  # before logging: a log handler may wait for us
            logger.error("The engine could not be loaded: %s", said(cause))
            return None
        return None if place is None else self._install(place)

    async def _load(self, recipe: Recipe, swapped_in: bool = False) -> Place | None:
        """A loaded engine, monitored from now on; None when it is time to stop, or to do a swap first.

        A load that waits for room yields to a swap, which may need less; it waits again if that fails.

        Raises:
            Exception: it could not be loaded, and was closed.
        """
        yields = recipe.rebuildable and not swapped_in
        place = await self._places.load(recipe, lambda: yields and bool(self._swaps))
        if place is not None:
            place.dead.add_done_callback(functools.partial(self._on_death, place))
        elif not self._stopped:
            self._rest.put_off()
        return place

    def _install(self, place: Place) -> Place:
        """Make this the serving engine."""
        self._rest.end()
        self._status.loaded(place.engine.tasks)
        self._rest.serves(self.recipe)
        self._calls.install(place)
        return place

    # --- dying ---

    def _on_death(self, place: Place, dead: asyncio.Future[BaseException]) -> None:
        """Report the death before closing the engine, which may be slow."""
        if self._calls.left_behind:
            return
        place.stop_computing()
        if self._calls.place is place:
            self._rest.busy()
            self._status.lost(died(dead.result()))
        self._calls.fail_begun(place, dead.result())

    async def _replace(self, place: Place) -> Place | None:
        """Replace a dead engine; None if it stays down."""
        cause = place.dead.result()
        self._on_death(place, place.dead)
        await self._places.close(place)
        return await self._rebuild(cause, died(cause))

    async def _rebuild(self, cause: BaseException, what: str) -> Place | None:
        """Load the engine again after ``what`` happened; None if it stays down or it is time to stop.

        A load that fails counts like a death: the last engine's memory may not be free yet.
        """
        while await self._may_come_back(cause, what):
            try:
                place = await self._load(self.recipe)
            except Exception as error:
                cause, what = error, not_again(error)
                continue
            if place is None:
                return None
            self._status.restarts += 1
            return self._install(place)
        return None

    async def _may_come_back(self, cause: BaseException, what: str) -> bool:
        """Whether the engine may be loaded again after ``what`` happened; waits until it may."""
        deaths, now = self._status.deaths, time.monotonic()
        deaths.append(now)
        while now - deaths[0] > FAILURE_WINDOW:
            deaths.popleft()
        if not self.recipe.rebuildable:
            why = "It was given as an instance, which cannot be rebuilt; give a function that builds it."
        elif is_sticky(cause):
            why = "The device is in a state that only a new process clears; restart the process."
        elif len(deaths) >= MAX_FAILURES:
            why = f"It was lost {len(deaths)} times in {FAILURE_WINDOW:.0f} s and stays down. Restart, or swap models."
        else:
            self._status.lost(what)
            _log(what)
            await self._places.unless_stopped(timeout=_backoff(len(deaths)))
            return not self._stopped
        error = EngineDeadError(f"The engine is down: {what}. {why}")
        error.__cause__ = cause
        self._stay_down(error)
        _log(what)
        return False

    def _stay_down(self, error: LMBridgeError) -> None:
        self._status.failed(error)
        self._calls.refuse(error)

    # --- resting ---

    async def _unload(self, place: Place, why: str) -> Place | None:
        """Unload an idle model until the next call."""
        self._calls.vacate(place)
        self._rest.begin()
        self._status.unloaded(f"{why}; the next call loads it again")
        logger.info("The model %s was unloaded: %s.", self.recipe.label, why)
        if place.stay is not None:
            place.stay.count_unload()
        await self._places.close(place)
        return None

    async def _come_back(self) -> Place | None:
        """Load the engine again; None if it stays down or it is time to stop."""
        self._status.loading(self._rest.over)
        self._rest.end()
        return await self._bring_back()

    # --- swapping ---

    async def _exchange(self, old: Place | None) -> Place | None:
        """Replace the engine; returns the one serving afterwards, which may be the old one."""
        swap = self._swaps.begin()
        if swap is None:
            return old
        self._rest.busy()
        if self._calls.left_behind:  # only now: the successor did not see the swap begin
            swap.done.tell(EngineStartError(STUCK))
            self._swaps.end(swap)
            return old
        if swap.overlap or old is None:
            place = await self._swap_beside(old, swap)
        else:
            place = await self._swap_in_place(old, swap)
        self._swaps.end(swap)
        if place is not None and place is old:
            self._rest.serves(self.recipe)
        return place

    async def _swap_beside(self, old: Place | None, swap: Swap) -> Place | None:
        try:
            new = await self._load(swap.recipe, swapped_in=True)
        except Exception as cause:
            self._fail(swap, cause, old)
            return old
        if new is None:
            return old
        if old is not None:
            self._calls.vacate(old)
            self._places.retire(old)
        return self._take_over(new, swap)

    async def _swap_in_place(self, old: Place, swap: Swap) -> Place | None:
        """Drain and free the old engine, then load the new one; if that fails, reload the old one."""
        self._calls.vacate(old)
        self._status.holds("a swap is waiting for running requests to finish")
        quiet = asyncio.ensure_future(old.quiet())
        await self._places.unless_stopped(quiet, old.dead, timeout=swap.timeout)
        quiet.cancel()
        if old.calls and not old.dead.done():
            swap.done.tell(
                RequestTimeoutError(f"Running requests did not end within {swap.timeout} s; the old model serves on.")
            )
            return old if self._stopped else self._install(old)
        self._status.loading("a swap is loading the new model")
        await self._places.close(old)
        try:
            new = await self._load(swap.recipe, swapped_in=True)
        except Exception as cause:
            back = await self._bring_back()
            self._fail(swap, cause, back)
            return back
        return None if new is None else self._take_over(new, swap)

    async def _bring_back(self) -> Place | None:
        """Reload the engine that had made room; None if that fails."""
        try:
            place = await self._load(self.recipe)
        except Exception as cause:
            return await self._rebuild(cause, not_again(cause))
        return None if place is None else self._install(place)

    def _take_over(self, new: Place, swap: Swap) -> Place:
        self.recipe = swap.recipe
        self._install(new)
        swap.done.tell()
        return new

    def _fail(self, swap: Swap, cause: Exception, place: Place | None) -> None:
        """Report to the requester that the new model could not be loaded, and what serves now."""
        error = swap_error(cause, place, self._rest.unloaded)
        swap.done.tell(error)
        logger.error("The swap failed: %s", error)

    # --- waiting ---

    async def _until_called(self, place: Place | None) -> None:
        """Wait for a request to stop, swap or reload, for the engine's death, or for the time to unload."""
        self._called.clear()
        if self._stopped or self._swaps or self._rest.pending:
            return
        called: asyncio.Future[Any] = asyncio.ensure_future(self._called.wait())
        awaited, patience = ([called], None) if place is None else ([called, place.dead], self._rest.patience())
        await asyncio.wait(awaited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        called.cancel()


def _log(what: str) -> None:
    logger.error("%s%s.", what[0].upper(), what[1:])


def _backoff(deaths: int) -> float:
    """Seconds to wait after this many deaths."""
    return min(FIRST_BACKOFF * 4.0 ** min(deaths - 1, 100), LAST_BACKOFF)
