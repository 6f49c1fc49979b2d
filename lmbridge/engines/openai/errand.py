"""The retries of one request from server to server.

Rule: server thread only. A request that a server has started goes to no other, unless the server sent nothing for it
and its connection broke; and then only once.
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
"""How often a request is retried on failing servers."""
MOST_BEGINNINGS = 2
"""How often a request may have been started before it counts as the cause of the failures."""


class Errand:
    """Finds a server for one request, until one has started it."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._beginnings = 0
        self._shunned: Server | None = None
        self._renamed: set[Server] = set()
        self._refusals = 0

    async def next(self) -> Server:
        """The server to try now.

        Raises:
            EngineError: no server is left.
        """
        return await self._group.free(self._shunned)

    async def failed(self, server: Server, question: Question, what: NotServedError, begun: bool) -> Question:
        """A server did not serve it; returns the question for ``next`` to retry.

        Raises:
            LMBridgeError: a retry is useless.
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
        """Ask the server for its models again; if it still lists this one, raise its refusal."""
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
        elif not (isinstance(what, AwayError) and what.was_old):  # a new connection will show whether it is there
            server.rest(what.said)
        if isinstance(what, (AwayError, BusyError)) and what.broke:
            self._beginnings, self._shunned = self._beginnings + 1, server
        if self._refusals > MOST_REFUSALS or self._beginnings >= MOST_BEGINNINGS:
            raise passing(
                f"The server {server.url} cannot serve now: {what.said}. Send it again later.", what
            ) from what
