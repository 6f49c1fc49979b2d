"""Servers of one model: which are available, and which gets the next request.

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
"""Seconds that the other servers have at the start once one has answered."""


class Group:
    """Servers of one model.

    Args:
        tell_busy: called with the seconds for which all servers ask to wait.
        of_one_kind: all must be of the same kind, because no flavour was given.
    """

    def __init__(self, servers: Sequence[Server], tell_busy: Callable[[float], None], of_one_kind: bool = True) -> None:
        self.servers = servers
        self._tell_busy = tell_busy
        self._of_one_kind = of_one_kind
        self._turn = 0  # breaks ties between equally loaded servers
        self._change = asyncio.Event()
        self._names: set[str] = set()  # of their models, once a difference was logged
        for server in servers:
            server.on_change = self._changed

    async def reach(self) -> Server:
        """Ask all servers; returns the first in the list that answers. Slow ones may join later.

        Raises:
            EngineStartError: none answers, or their kinds differ.
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
        """All servers must be of one kind, which determines the fields."""
        for server in self.servers if self._of_one_kind else ():
            server.expected = there[0].flavour
            if server in there and server.flavour is not server.expected:
                raise other_kind(server)
        self._changed()

    def _changed(self) -> None:
        """Wake the waiting requests, and tell the bridge how long all servers are busy."""
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
        """The least loaded available server; waits while all are full.

        Args:
            shunned: used only if no other server is available.

        Raises:
            EngineError: no server is available.
        """
        loop = asyncio.get_running_loop()
        while True:
            there = [server for server in self.servers if server.away is None]
            if not there:
                causes = "; ".join(server.trouble for server in self.servers)
                raise passing(f"No server is available for the request ({causes}). Send it again later.")
            there = [server for server in there if server is not shunned] or there
            now = loop.time()
            ready = [server for server in there if server.held_until <= now]
            if ready:
                return self._least(ready)
            seconds = min(server.held_until for server in there) - now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * random.uniform(1.0, 1.1)):  # spreads the retries
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
