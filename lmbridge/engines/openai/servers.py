"""The servers of one group: which of them are there, what each serves, and which gets the next request.

Rule: server thread only. A server that is away rests, and is asked in the background whether it is back; one that says
that it is full is left alone for as long as it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from lmbridge.engines.openai.asking import Question
from lmbridge.engines.openai.errors import (
    AwayError,
    BusyError,
    GoneError,
    NoRoomError,
    NotServedError,
    UnwantedError,
    in_our_words,
    lost,
    passing,
)
from lmbridge.engines.openai.flavours import Flavour, flavour_of
from lmbridge.engines.openai.library import get
from lmbridge.engines.openai.options import shown_url
from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.log import logger, said
from lmbridge.messages import Task

LOOK = 1.0
"""Seconds between two questions to a server that is away."""
SILENCE = 10.0
"""Seconds for which a server may say nothing of what it works on before it is asked whether it lives."""
LEAST_WAIT = 0.1
"""Seconds that one who is full is left alone for, however few it asks for."""
MOST_REFUSALS = 3
"""How often a request is sent again to servers that are unwell, and say when they may be better."""


class Server:
    """One server.

    Attributes:
        url: for messages.
        model: what it calls the model; known once it has answered.
        flavour: what kind it is, as it says itself.
        tasks: what its model does; empty where it does not say.
        offers: what each of its models does.
        away: why it gets no requests; None while it does.
        held_until: by the loop's clock: it has asked to be left alone until then.
        alive: rises whenever it was asked whether it lives, and does.
        unwanted: fields that it does not take.
    """

    def __init__(self, url: str, client: Any, model: str | None, tasks: frozenset[Task] | None = None) -> None:
        self.url = shown_url(url)
        self.client = client
        self.model = model or ""
        self.flavour: Flavour | None = None
        self.tasks = frozenset[Task]()
        self.offers: dict[str, frozenset[Task]] = {}
        self.away: str | None = "it was not asked yet"
        self.held_until = 0.0
        self.alive = 0
        self.unwanted: frozenset[str] = frozenset()
        self.spoke = False  # since the last look
        self._wanted = model
        self._wanted_tasks = tasks
        self._working: set[asyncio.Task[Any]] = set()  # that wait for it
        self._cut: set[asyncio.Task[Any]] = set()  # of those, the ones that are told that it is gone

    @property
    def in_flight(self) -> int:
        return len(self._working)

    @property
    def trouble(self) -> str:
        """Why it does not serve, beside its address."""
        why = self.away or "it did not take the request"
        return why if self.url in why else f"{self.url}: {why}"

    async def look(self) -> None:
        """Ask it for its models, and choose: the one that was named, or else the first that does what is wanted.

        Raises:
            NotServedError, LMBridgeError: it does not answer, or serves no such model.
        """
        with in_our_words(self.url):
            listed = [model for model in (await get(self.client, "/models"))["data"] if isinstance(model["id"], str)]
        self.offers = {model["id"]: _tasks(model.get("lmbridge")) for model in listed}
        chosen = self._choose()
        if chosen is None:
            raise self._lacks()
        found = next(model for model in listed if model["id"] == chosen)
        self.model, self.flavour = chosen, flavour_of(found.get("owned_by"))
        self.tasks = self.offers[chosen] or self.tasks

    def _choose(self) -> str | None:
        """The one that it was, if it can be. One that does not say what it does comes after those that do it."""
        wanted = self._wanted_tasks or self.tasks
        names = [name for name in self.offers if self._wanted in (None, name)]
        able = [name for name in names if not self.offers[name] or wanted <= self.offers[name]]
        return min(able, key=lambda name: (name != self.model, not wanted <= self.offers[name]), default=None)

    def _lacks(self) -> EngineStartError:
        wanted = "" if self._wanted is None else f" {self._wanted!r}"
        if self._wanted is None or self._wanted in self.offers:
            wanted += f" that can {' and '.join(sorted(self._wanted_tasks or self.tasks))}"
        serves = [f"{name} ({', '.join(sorted(does))})" if does else name for name, does in self.offers.items()]
        hint = "; give one of these as model_name=" if self._wanted not in (None, *self.offers) else ""
        told = f"It serves {', '.join(serves[:20]) or 'no model'}{hint if serves else ''}."
        return EngineStartError(f"The server {self.url} has no model{wanted}. {told}")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """For as long as the current task waits for this server.

        Raises:
            AwayError: it was found to be gone meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        self._working.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut or task.uncancel() > 0:  # or it was aborted as well
                raise
            raise AwayError(self.away or "it does not answer") from None
        finally:
            self._working.discard(task)
            self._cut.discard(task)

    def rest(self, why: str) -> None:
        """It gets no requests until it is back."""
        if self.away is None:
            logger.warning("The server %s is away: %s. It is asked again each %g s.", self.url, why, LOOK)
        self.away = why

    def cut(self) -> None:
        """Tell whoever waits for it that it is gone."""
        for task in self._working - self._cut:
            self._cut.add(task)
            task.cancel()

    async def watch(self) -> None:
        """For ever: see whether it is back when it is away, and whether it lives when it is silent."""
        silent, failures = 0.0, 0
        while True:
            await asyncio.sleep(LOOK)
            silent = 0.0 if self.spoke or not self._working else silent + LOOK
            self.spoke = False
            if self.away is None and silent < SILENCE:
                failures = 0
                continue
            why = await self._ails()
            failures = 0 if why is None else failures + 1
            if why is None:
                silent = 0.0
                self._is_there()
            elif self.away is not None or failures > 1:
                self.rest(why)
                if silent >= SILENCE:  # one that is told to end may still finish what it has
                    self.cut()

    async def _ails(self) -> str | None:
        """Why it cannot be had; None where nothing is wrong."""
        try:
            await self.look()
        except BusyError:
            return None
        except Exception as cause:
            return said(cause)
        return None

    def _is_there(self) -> None:
        self.alive += 1
        if self.away is not None:
            self.away = None
            logger.warning("The server %s is back.", self.url)


class Group:
    """Servers that serve one model.

    Args:
        tell_busy: is told for how many seconds all of them want to be left alone.
    """

    def __init__(self, servers: Sequence[Server], tell_busy: Callable[[float], None]) -> None:
        self.servers = servers
        self._tell_busy = tell_busy
        self._turn = 0  # whose it is where several have as little to do

    async def reach(self) -> Server:
        """Ask all of them; the first in the list that is there.

        Raises:
            EngineStartError: none is.
        """
        found = await asyncio.gather(*(server.look() for server in self.servers), return_exceptions=True)
        for server, error in zip(self.servers, found, strict=True):
            server.away = None if error is None else said(error)
        there = [server for server in self.servers if server.away is None]
        if there:
            for server in self.servers:
                if server.away is not None:
                    logger.warning("The server %s is away: %s.", server.url, server.away)
            return there[0]
        causes = "; ".join(server.trouble for server in self.servers)
        cause = next((error for error in found if _has_answered(error)), None)
        if cause is None:
            text = f"No server could be reached ({causes}). Start it, or give another URL."
            raise EngineStartError(text) from found[0]
        if len(found) == 1 and isinstance(cause, LMBridgeError):
            raise EngineStartError(str(cause)) from cause
        raise EngineStartError(f"No server can be used ({causes}).") from cause

    async def free(self, tried: Collection[Server]) -> Server:
        """The server with the least to do of those that are there and were not tried; waits while all are full.

        Raises:
            EngineError: there is none.
        """
        loop = asyncio.get_running_loop()
        while True:
            there = [server for server in self.servers if server.away is None and server not in tried]
            if not there:
                causes = "; ".join(server.trouble for server in self.servers)
                raise passing(f"No server is there for the request ({causes}). Send it again later.")
            now = loop.time()
            ready = [server for server in there if server.held_until <= now]
            if ready:
                return self._least(ready)
            seconds = min(server.held_until for server in there) - now
            self._tell_busy(seconds)
            await asyncio.sleep(seconds * random.uniform(1.0, 1.1))  # all who wait need not come at once

    def _least(self, ready: Sequence[Server]) -> Server:
        self._turn += 1
        turned = [ready[(self._turn + place) % len(ready)] for place in range(len(ready))]
        return min(turned, key=lambda server: server.in_flight)


class Errand:
    """One request's way from server to server, until one has begun with it."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._tried: set[Server] = set()
        self._broke: set[Server] = set()
        self._renamed: set[Server] = set()
        self._refusals = 0

    async def next(self) -> Server:
        """Where to go now.

        Raises:
            EngineError: there is no server left.
        """
        return await self._group.free(self._tried)

    async def failed(self, server: Server, question: Question, what: NotServedError, begun: bool) -> Question:
        """A server did not serve it; what to go on with by ``next``.

        Raises:
            LMBridgeError: that is no use.
        """
        if isinstance(what, NoRoomError):
            return question.with_what_is_left(what.tokens)
        if isinstance(what, UnwantedError):
            server.unwanted |= {what.field}
        elif begun:
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
            self._leave(server, said(cause))

    def _go_on(self, server: Server, what: NotServedError) -> None:
        if isinstance(what, BusyError):
            server.held_until = asyncio.get_running_loop().time() + max(what.seconds, LEAST_WAIT)
            self._refusals += what.ails
        elif isinstance(what, AwayError) and what.broke and server not in self._broke:
            self._broke.add(server)  # it may have closed an old connection as this went out on it: a new one will tell
        else:
            self._leave(server, what.said)
        if self._refusals > MOST_REFUSALS:
            raise passing(
                f"The server {server.url} cannot serve now: {what.said}. Send it again later.", what
            ) from what

    def _leave(self, server: Server, why: str) -> None:
        server.rest(why)
        self._tried.add(server)


def _has_answered(error: object) -> bool:
    return not isinstance(error, AwayError) or error.answered


def _tasks(told: Any) -> frozenset[Task]:
    """What ``lmbridge serve`` says of its models; others say nothing."""
    tasks = told.get("tasks") if isinstance(told, dict) else None
    return frozenset(tasks) & {"generate", "embed", "rerank"} if isinstance(tasks, list) else frozenset()
