"""The engine's life: loaded, watched, rebuilt when it dies, exchanged for another, closed.

Rule: server thread only. One coroutine, ``run``, is the whole life; everything else here is one of its chapters.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lmbridge.crossing.status import Status
from lmbridge.engines import EngineFactory
from lmbridge.engines.base import Engine
from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineStartError,
    LMBridgeError,
    RequestTimeoutError,
)
from lmbridge.server.loop import ServerLoop
from lmbridge.server.place import Place

logger = logging.getLogger("lmbridge")

MAX_FAILURES = 3  # deaths within FAILURE_WINDOW seconds after which the engine stays down
FAILURE_WINDOW = 300.0
FIRST_BACKOFF = 0.1  # seconds before the first rebuild; each further one waits four times longer
CLOSE_GRACE = 10.0  # seconds an engine may take to close before it is left behind


@dataclass(frozen=True)
class Recipe:
    """How to build the engine, what to call it, and whether it can be built again."""

    build: EngineFactory
    label: str
    rebuildable: bool


@dataclass
class Swap:
    """A request to exchange the engine; ``done`` tells whoever asked."""

    recipe: Recipe
    overlap: bool
    timeout: float | None
    done: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


class Supervisor:
    """Keeps one engine at the server until it is told to stop."""

    def __init__(self, server: ServerLoop, recipe: Recipe) -> None:
        self.recipe = recipe
        self._sweep = server.sweep
        self._calls = server.calls
        self._status: Status = server.handle.status
        self._stop = asyncio.Event()
        self._drain_until: float | None = None
        self._swaps: deque[Swap] = deque()  # the first one may be under way
        self._called = asyncio.Event()  # to stop, or to swap
        self._retiring: set[asyncio.Task[None]] = set()

    def stop(self, drain: bool, timeout: float) -> None:
        """End ``run``: after what lives has finished, at most ``timeout`` seconds, or at once."""
        if drain and not self._stop.is_set():
            self._drain_until = time.monotonic() + timeout
        self._stop.set()
        self._called.set()

    def swap(self, request: Swap) -> None:
        """Exchange the engine as soon as the present one is in a state to be exchanged."""
        self._swaps.append(request)
        self._called.set()

    def fail_swaps(self, error: LMBridgeError) -> None:
        """Tell those who wait for a swap that there will be none. The loop need not run any more."""
        while self._swaps:
            swap = self._swaps.popleft()
            if not swap.done.done():
                swap.done.set_exception(error)

    async def run(self, after_death: BaseException | None = None) -> None:
        """The whole life. ``after_death``: why the engine of a server thread before this one was lost."""
        sweep = asyncio.ensure_future(self._sweep.run())
        place: Place | None = None
        try:
            if after_death is None or await self._survives(after_death):
                place = await self._open(self.recipe)
            while not self._stop.is_set():
                await self._until_called(place)
                if self._swaps and not self._stop.is_set():
                    place = await self._exchange(place, self._swaps[0])
                    self._swaps.popleft()
                elif place is not None and place.dead.done():
                    place = await self._replace(place)
            await self._wind_up(place)
        finally:
            sweep.cancel()

    # --- loading ---

    async def _open(self, recipe: Recipe) -> Place | None:
        """Load an engine and give it the place; None when that failed, or when it is time to stop."""
        try:
            place = await self._load(recipe)
        except Exception as cause:
            logger.error("The engine could not be loaded: %r", cause)
            self._stay_down(start_error(cause))
            return None
        if place is not None:
            self._install(place)
        return place

    def _install(self, place: Place) -> None:
        place.dead.add_done_callback(lambda dead: self._on_death(place, dead.result()))
        self._sweep.places.append(place)
        self._status.loaded()
        self._calls.install(place)

    def _on_death(self, place: Place, cause: BaseException) -> None:
        """Tell it before the dead engine is closed, which may take its time."""
        if self._calls.place is place and self._status.state == "ready":
            self._status.died(cause)
        self._calls.fail_begun(place, cause)

    async def _load(self, recipe: Recipe) -> Place | None:
        """A loaded engine; None when it is time to stop.

        Raises:
            Exception: it could not be loaded, and has been closed.
        """
        engine = recipe.build()
        place = Place(engine)
        starting = asyncio.ensure_future(_start(engine))
        await self._unless_stopped(starting)
        if starting.done() and starting.exception() is None:
            return place
        starting.cancel()
        await asyncio.wait([starting], timeout=CLOSE_GRACE)
        await _close(engine)
        if not self._stop.is_set():
            starting.result()
        return None

    # --- dying ---

    async def _replace(self, place: Place) -> Place | None:
        """Follow a dead engine with a new one; None when it stays down."""
        await self._close(place)
        return await self._open(self.recipe) if await self._survives(place.dead.result()) else None

    async def _survives(self, cause: BaseException) -> bool:
        """Whether a new engine may follow one that died of ``cause``; waits before it may."""
        logger.error("The engine died: %r", cause)
        deaths, now = self._status.deaths, time.monotonic()
        deaths.append(now)
        while now - deaths[0] > FAILURE_WINDOW:
            deaths.popleft()
        if not self.recipe.rebuildable:
            why = "it was given as an instance, which cannot be rebuilt; give a factory"
        elif _is_sticky(cause):
            why = "the device is in a state that only a new process clears; restart the process"
        elif len(deaths) >= MAX_FAILURES:
            why = f"it died {len(deaths)} times in {FAILURE_WINDOW:.0f} s and stays down"
        else:
            self._status.died(cause)
            self._status.restarts += 1
            await self._unless_stopped(timeout=FIRST_BACKOFF * 4 ** (len(deaths) - 1))
            return True
        error = EngineDeadError(f"The engine is dead ({cause!r}): {why}. Build a new Bridge, or swap in another model.")
        error.__cause__ = cause
        self._stay_down(error)
        return False

    def _stay_down(self, error: LMBridgeError) -> None:
        self._status.failed(error)
        self._calls.refuse(error)

    # --- swapping ---

    async def _exchange(self, old: Place | None, swap: Swap) -> Place | None:
        """Put another engine into the old one's place; the engine that has it afterwards, which may be the old one."""
        try:
            if swap.overlap or old is None:
                new = await self._load(swap.recipe)
                if new is not None and old is not None:
                    self._retire(old)
            else:
                new = await self._load_in_place(old, swap)
        except Exception as cause:
            error = cause if isinstance(cause, LMBridgeError) else start_error(cause)
            logger.error("The swap failed: %s", error)
            swap.done.set_exception(error)
            return old if swap.overlap else self._calls.place  # which may have died meanwhile: it is replaced then
        if new is None:
            swap.done.set_exception(BridgeClosedError("The bridge was closed before the new model was ready."))
            return old
        self.recipe = swap.recipe
        self._install(new)
        swap.done.set_result(None)
        return new

    async def _load_in_place(self, old: Place, swap: Swap) -> Place | None:
        """Drain and free the old engine, then load the new one; a failed load brings the old one back."""
        self._calls.vacate(old)
        quiet = asyncio.ensure_future(old.quiet())
        await self._unless_stopped(quiet, old.dead, timeout=swap.timeout)
        quiet.cancel()
        if old.calls and not old.dead.done():
            self._calls.install(old)
            raise RequestTimeoutError(f"What runs did not finish within {swap.timeout} s; the old model goes on.")
        await self._close(old)
        try:
            return await self._load(swap.recipe)
        except Exception:
            await self._open(self.recipe)
            raise

    def _retire(self, place: Place) -> None:
        """Let the engine finish what it has begun, and close it then."""
        self._calls.vacate(place)
        task = asyncio.ensure_future(self._see_off(place))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _see_off(self, place: Place) -> None:
        quiet = asyncio.ensure_future(place.quiet())
        either: list[asyncio.Future[Any]] = [quiet, place.dead]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        quiet.cancel()
        await self._close(place)

    # --- stopping ---

    async def _wind_up(self, place: Place | None) -> None:
        """Drain as asked, end what is left, close every engine."""
        self._status.state = "draining"
        if self._drain_until is not None and place is not None:
            drained = asyncio.ensure_future(self._calls.drained())
            either: list[asyncio.Future[Any]] = [drained, place.dead]
            patience = max(0.0, self._drain_until - time.monotonic())
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
        closed = BridgeClosedError("The bridge was closed; its requests were aborted.")
        self.fail_swaps(closed)
        self._calls.end_all(closed)
        if place is not None:
            await self._close(place)
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=CLOSE_GRACE)

    async def _close(self, place: Place) -> None:
        """Close the engine; it is looked after to its end."""
        await _close(place.engine)
        self._sweep.places.remove(place)

    # --- waiting ---

    async def _until_called(self, place: Place | None) -> None:
        """Wait for a call to stop or to swap, or for the engine's death."""
        self._called.clear()
        if self._stop.is_set() or self._swaps:
            return
        called: asyncio.Future[Any] = asyncio.ensure_future(self._called.wait())
        await asyncio.wait([called] if place is None else [called, place.dead], return_when=asyncio.FIRST_COMPLETED)
        called.cancel()

    async def _unless_stopped(self, *futures: asyncio.Future[Any], timeout: float | None = None) -> None:
        """Wait for any of ``futures`` or for ``timeout`` seconds; a call to stop ends the wait too."""
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([*futures, stopped], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()


def start_error(cause: BaseException) -> EngineStartError:
    """What everybody gets while an engine that could not be loaded is not replaced."""
    why = str(cause).rstrip(".") or repr(cause)
    error = EngineStartError(f"The engine could not be loaded: {why}. Build a new Bridge once that is mended.")
    error.__cause__ = cause
    return error


def _is_sticky(cause: BaseException) -> bool:
    """Whether the cause is a device error after which every later call to the device fails too.

    A guess by name: torch's AcceleratorError, and messages of older versions. Lack of memory is not sticky.
    """
    chain: BaseException | None = cause
    while chain is not None:
        text = str(chain)
        if type(chain).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text:
            return True
        chain = chain.__cause__
    return False


async def _start(engine: Engine) -> None:
    """Start the engine; a library that calls exit() must not take the loop with it."""
    try:
        await engine.start()
    except (SystemExit, KeyboardInterrupt) as cause:
        raise RuntimeError(f"{engine.name} asked the process to exit: {cause!r}") from cause


async def _close(engine: Engine) -> None:
    try:
        await asyncio.wait_for(engine.close(), CLOSE_GRACE)
    except TimeoutError:
        logger.warning("The engine %s did not close within %.0f s; it is left behind.", engine.name, CLOSE_GRACE)
    except Exception:
        logger.exception("The engine %s failed while closing.", engine.name)
