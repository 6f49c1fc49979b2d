"""The engines of one server thread: builds, starts, monitors and closes them.

Rule: server thread only.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from lmbridge.server.border import build_engine, close_engine, failure, start_engine
from lmbridge.server.lodging import Lodging
from lmbridge.server.place import Place
from lmbridge.server.swaps import Recipe

CLOSE_GRACE = 10.0  # seconds an engine may take to close before it is left behind


class Places:
    """Loads engines and closes them.

    Args:
        watched: what the sweep checks: every engine from being built until closed.
        lodging: finds room for them.

    Attributes:
        stop: set once it is time to end; then only ``close_all`` waits, for the engines to end.
    """

    def __init__(self, watched: list[Place], lodging: Lodging) -> None:
        self.stop = asyncio.Event()
        self._watched = watched
        self._lodging = lodging
        self._closing: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    async def load(self, recipe: Recipe, gives_way: Callable[[], bool] = lambda: False) -> Place | None:
        """Load an engine once there is room on its device; None when it is time to stop, or it gave way.

        Args:
            gives_way: asked now and then while waiting for room: whether something else must come first.

        Raises:
            Exception: it could not be loaded, and was closed.
        """
        if self.stop.is_set():
            return None
        engine = build_engine(recipe.build)
        if any(place.engine is engine for place in self._watched):
            raise ValueError("this engine is still open and can be started only once; build another")
        place = Place(engine)
        self._watched.append(place)
        try:
            place.listen()
            over = functools.partial(self._over, gives_way)
            there_is_room = await self._lodging.move_in(engine, recipe, place.move_in, self.unless_stopped, over)
            if self.stop.is_set():
                return None
            if not there_is_room:
                await self.close(place)
                return None
            place.starting = start_engine(engine)
            await self.unless_stopped(place.starting)
            if self.stop.is_set():
                return None
            error = failure(place.starting) or place.measure()
        except Exception as cause:
            error = cause
        if error is None:
            if place.stay is not None:
                place.stay.loaded(engine)
            return place
        await self.close(place)
        raise error

    def retire(self, place: Place) -> None:
        """Let an engine without new calls finish its work, then close it."""
        task = asyncio.ensure_future(self._see_off(place))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self, place: Place) -> None:
        """Close an engine; when it is time to stop, closing continues in the background."""
        await self.unless_stopped(self._put_away(place))

    async def close_all(self) -> None:
        """Close all remaining engines, concurrently."""
        for place in self._watched:
            self._put_away(place)
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_GRACE)

    async def unless_stopped(self, *futures: asyncio.Future[Any], timeout: float | None = None) -> None:
        """Wait for any of ``futures``, for ``timeout`` seconds or until stopped."""
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self.stop.wait())
        await asyncio.wait([*futures, stopped], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    def _over(self, gives_way: Callable[[], bool]) -> bool:
        return self.stop.is_set() or gives_way()

    async def _see_off(self, place: Place) -> None:
        quiet: asyncio.Future[Any] = asyncio.ensure_future(place.quiet())
        await asyncio.wait([quiet, place.dead], return_when=asyncio.FIRST_COMPLETED)
        quiet.cancel()
        self._put_away(place)

    def _put_away(self, place: Place) -> asyncio.Task[None]:
        """The single task that closes the engine."""
        if place.closing is None:
            place.stop_computing()
            place.closing = asyncio.ensure_future(self._end(place))
            self._closing.add(place.closing)
            place.closing.add_done_callback(self._closing.discard)
        return place.closing

    async def _end(self, place: Place) -> None:
        starting = place.starting
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.wait([starting], timeout=CLOSE_GRACE / 2)
        try:
            await close_engine(place.engine, CLOSE_GRACE)
        finally:
            place.move_out()
        self._watched.remove(place)
