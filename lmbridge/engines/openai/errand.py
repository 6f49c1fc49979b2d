"""One request's way from server to server.

Rule: server thread only. A request that a server has begun with is sent to no other, unless the server said nothing of
it and its connection broke; and then once.
"""

from __future__ import annotations

from lmbridge.engines.openai.asking import Question
from lmbridge.engines.openai.errors import (
    AwayError,
    BusyError,
    GoneError,
    NoRoomError,
    NotServedError,
    UnwantedError,
    lost,
    passing,
)
from lmbridge.engines.openai.group import Group
from lmbridge.engines.openai.server import Server
from lmbridge.errors import LMBridgeError
from lmbridge.log import said

MOST_REFUSALS = 3
"""How often a request is sent again to servers that are unwell."""
MOST_BEGINNINGS = 2
"""How often a request may have been begun with before it is taken to be what breaks servers."""


class Errand:
    """One request's way from server to server, until one has begun with it."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._beginnings = 0
        self._shunned: Server | None = None
        self._renamed: set[Server] = set()
        self._refusals = 0

    async def next(self) -> Server:
        """Where to go now.

        Raises:
            EngineError: there is no server left.
        """
        return await self._group.free(self._shunned)

    async def failed(self, server: Server, question: Question, what: NotServedError, begun: bool) -> Question:
        """A server did not serve it; what to go on with by ``next``.

        Raises:
            LMBridgeError: that is no use.
        """
        if isinstance(what, NoRoomError):
            return question.with_what_is_left(what.tokens)
        if isinstance(what, UnwantedError):
            server.unwanted |= {what.field}
        elif begun or (isinstance(what, AwayError) and what.broke and what.answered):
            raise lost(server.url, what) from what
        elif isinstance(what, GoneError):
            await self._look_again(server, what)
        else:
            self._go_on(server, what)
        return question

    async def _look_again(self, server: Server, what: GoneError) -> None:
        """It may have come back with another model; one that lists the model, and does not know it, has had its say."""
        if server in self._renamed:
            raise what.refusal from what.__cause__
        self._renamed.add(server)
        try:
            await server.look()
        except (NotServedError, LMBridgeError) as cause:
            server.rest(said(cause))

    def _go_on(self, server: Server, what: NotServedError) -> None:
        if isinstance(what, BusyError):
            server.hold(what.seconds)
            self._refusals += what.ails
        elif not (isinstance(what, AwayError) and what.was_old):  # a new connection will tell whether it is there
            server.rest(what.said)
        if isinstance(what, (AwayError, BusyError)) and what.broke:
            self._beginnings, self._shunned = self._beginnings + 1, server
        if self._refusals > MOST_REFUSALS or self._beginnings >= MOST_BEGINNINGS:
            raise passing(
                f"The server {server.url} cannot serve now: {what.said}. Send it again later.", what
            ) from what
