"""The engines of one server thread: each is built, started and closed here, and looked after in between.

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
        watched: what the sweep looks at: every engine from the moment it was built until it is closed.
        lodging: where they find room.

    Attributes:
        stop: set once it is time to end. Nothing is waited for then but the engines' ends, by ``close_all``.
    """

    def __init__(self, watched: list[Place], lodging: Lodging) -> None:
        self.stop = asyncio.Event()
        self._watched = watched
        self._lodging = lodging
        self._closing: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    async def load(self, recipe: Recipe, gives_way: Callable[[], bool] = lambda: False) -> Place | None:
        """A loaded engine, which has waited for room on its device; None when it is time to stop, or it gave way.

        Args:
            gives_way: asked now and then while it waits for room: whether something else is to be done first.

        Raises:
            Exception: it could not be loaded, and has been closed.
        """
        if self.stop.is_set():
            return None
        engine = build_engine(recipe.build)
        if any(place.engine is engine for place in self._watched):
            raise ValueError("this engine has not been closed yet, and could be started but once; build another")
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
        """Let an engine that gets nothing more finish what it has begun, and close it then."""
        task = asyncio.ensure_future(self._see_off(place))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self, place: Place) -> None:
        """Close an engine; when it is time to stop, that goes on without whoever waits."""
        await self.unless_stopped(self._put_away(place))

    async def close_all(self) -> None:
        """Close the engines that are left, all at once."""
        for place in self._watched:
            self._put_away(place)
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_GRACE)

    async def unless_stopped(self, *futures: asyncio.Future[Any], timeout: float | None = None) -> None:
        """Wait for any of ``futures`` or for ``timeout`` seconds; a call to stop ends the wait too."""
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
        """The one task that closes the engine."""
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
