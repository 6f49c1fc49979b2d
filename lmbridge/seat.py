"""One engine's place at the server: what it works on, whether it moves, and whether it has died.

Rule: server thread only, but for ``load`` and ``progress``, which the watchdog reads.
"""

from __future__ import annotations

import asyncio

from lmbridge.engines.base import Engine


class Seat:
    """An engine and the calls it has begun."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.load = 0  # calls begun and not ended
        self.progress = 0  # rises with everything the engine says
        self.dead: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._quiet: asyncio.Event | None = None  # there while somebody waits for it
        engine.on_death = self.die

    @property
    def room(self) -> int:
        """How many more calls the engine takes now."""
        return 0 if self.dead.done() else self.engine.max_batch_size - self.load

    def leave(self) -> None:
        """One call has ended."""
        self.load -= 1
        if self._quiet is not None and not self.load:
            self._quiet.set()

    async def quiet(self) -> None:
        """Return when the engine works on nothing."""
        while self.load:
            self._quiet = asyncio.Event()
            await self._quiet.wait()

    def die(self, cause: BaseException) -> None:
        """The engine cannot go on. The first cause counts."""
        if not self.dead.done():
            self.dead.set_result(cause)
