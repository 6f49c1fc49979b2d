"""Servers that serve one model: which of them are there, and which gets the next request.

Rule: server thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence

from lmbridge.engines.openai.errors import AwayError, passing
from lmbridge.engines.openai.server import Server, other_kind
from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.log import logger, said

LATE = 1.0
"""Seconds that the others have at the start, once one has answered."""


class Group:
    """Servers that serve one model.

    Args:
        tell_busy: is told for how many seconds all of them want to be left alone.
        of_one_kind: they must be, since nobody has said what kind they are.
    """

    def __init__(self, servers: Sequence[Server], tell_busy: Callable[[float], None], of_one_kind: bool = True) -> None:
        self.servers = servers
        self._tell_busy = tell_busy
        self._of_one_kind = of_one_kind
        self._turn = 0  # whose it is where several have as little to do
        self._change = asyncio.Event()
        self._names: set[str] = set()  # of their models, where these are several and that was said
        for server in servers:
            server.on_change = self._changed

    async def reach(self) -> Server:
        """Ask all of them; the first in the list that is there. Those that take long may join later.

        Raises:
            EngineStartError: none is, or they are of several kinds.
        """
        found = await self._look_at_all()
        for server, error in zip(self.servers, found, strict=True):
            server.away = None if error is None else said(error)
        there = [server for server in self.servers if server.away is None]
        if there:
            for server in self.servers:
                if server.away is not None:
                    logger.warning("The server %s is away: %s.", server.url, server.away)
            self._settle(there)
            return there[0]
        causes = "; ".join(server.trouble for server in self.servers)
        cause = next((error for error in found if _has_answered(error)), None)
        if cause is None:
            text = f"No server could be reached ({causes}). Start it, or give another URL."
            raise EngineStartError(text) from found[0]
        if len(found) == 1 and isinstance(cause, LMBridgeError):
            raise EngineStartError(str(cause)) from cause
        raise EngineStartError(f"No server can be used ({causes}).") from cause

    async def _look_at_all(self) -> list[BaseException | None]:
        looks = [asyncio.create_task(server.look(), name=f"lmbridge look at {server.url}") for server in self.servers]
        waiting = set(looks)
        try:
            while waiting and not any(_has_succeeded(look) for look in looks):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(looks, timeout=LATE)
        finally:
            for look in waiting:
                look.cancel()
        found = await asyncio.gather(*looks, return_exceptions=True)
        return [AwayError("it has not answered yet") if _is_cancelled(error) else error for error in found]

    def _settle(self, there: Sequence[Server]) -> None:
        """Fields are chosen by the kind of server: all must be of the same."""
        for server in self.servers if self._of_one_kind else ():
            server.expected = there[0].flavour
            if server in there and server.flavour is not server.expected:
                raise other_kind(server)
        self._changed()

    def _changed(self) -> None:
        """Whoever waits looks again, and the bridge hears for how long nobody need come."""
        self._change.set()
        self._change.clear()
        there = [server for server in self.servers if server.away is None]
        left = [server.held_until - asyncio.get_running_loop().time() for server in there]
        self._tell_busy(max(0.0, min(left, default=0.0)))
        names = {server.model for server in there}
        if len(names) > 1 and names != self._names:
            logger.warning("The servers of one group serve several models: %s.", ", ".join(sorted(names)))
            self._names = names

    async def free(self, shunned: Server | None) -> Server:
        """The server with the least to do of those that are there; waits while all are full.

        Args:
            shunned: is taken only where it is the last one that is there.

        Raises:
            EngineError: there is none.
        """
        loop = asyncio.get_running_loop()
        while True:
            there = [server for server in self.servers if server.away is None]
            if not there:
                causes = "; ".join(server.trouble for server in self.servers)
                raise passing(f"No server is there for the request ({causes}). Send it again later.")
            there = [server for server in there if server is not shunned] or there
            now = loop.time()
            ready = [server for server in there if server.held_until <= now]
            if ready:
                return self._least(ready)
            seconds = min(server.held_until for server in there) - now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * random.uniform(1.0, 1.1)):  # all who wait need not come at once
                    await self._change.wait()

    def _least(self, ready: Sequence[Server]) -> Server:
        self._turn += 1
        turned = [ready[(self._turn + place) % len(ready)] for place in range(len(ready))]
        return min(turned, key=lambda server: server.in_flight)


def _has_succeeded(look: asyncio.Task[None]) -> bool:
    return look.done() and not look.cancelled() and look.exception() is None


def _is_cancelled(error: object) -> bool:
    return isinstance(error, asyncio.CancelledError)


def _has_answered(error: object) -> bool:
    return not isinstance(error, AwayError) or error.answered
