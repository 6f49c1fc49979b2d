"""The servers of one group: which of them are there, what each serves, and which gets the next request.

Rule: server thread only. A server that is away rests, and is asked in the background whether it is back; one that says
that it is full is left alone for as long as it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
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
from lmbridge.errors import EngineStartError, LMBridgeError
from lmbridge.log import logger, said
from lmbridge.messages import Task

LOOK = 1.0
"""Seconds between two questions to a server that is away."""
SILENCE = 2.0
"""Seconds for which a server may say nothing of what it works on before it is asked whether it lives."""
LATE = 1.0
"""Seconds that the others have at the start, once one has answered."""
LEAST_WAIT = 0.1
"""Seconds that one who is full is left alone for, however few it asks for."""
MOST_REFUSALS = 3
"""How often a request is sent again to servers that are unwell."""
MOST_BEGINNINGS = 2
"""How often a request may have been begun with before it is taken to be what breaks servers."""


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
        heard: rises with everything it says, and whenever it was asked whether it lives, and does.
        unwanted: fields that it does not take.
        expected: what kind the others are; None: any will do.
        on_change: is called when it went away, is back, or is full.
    """

    def __init__(self, url: str, client: Any, model: str | None, tasks: frozenset[Task] | None = None) -> None:
        self.url = url
        self.client = client
        self.model = model or ""
        self.flavour: Flavour | None = None
        self.tasks = frozenset[Task]()
        self.offers: dict[str, frozenset[Task]] = {}
        self.away: str | None = "it was not asked yet"
        self.held_until = 0.0
        self.heard = 0
        self.unwanted: frozenset[str] = frozenset()
        self.expected: Flavour | None = None
        self.on_change: Callable[[], None] = lambda: None
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
        why = self.away or "it does not serve"
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
        if self.expected not in (None, self.flavour):
            raise _other_kind(self)
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
            raise AwayError(self.away or "it does not answer", broke=True) from None
        finally:
            self._working.discard(task)
            self._cut.discard(task)

    def rest(self, why: str) -> None:
        """It gets no requests until it is back."""
        if self.away is None:
            logger.warning("The server %s is away: %s. It is asked again each %g s.", self.url, why, LOOK)
            self.away = why
            self.on_change()
        self.away = why

    def hold(self, seconds: float) -> None:
        """It is full, and gets no requests for so long."""
        self.held_until = asyncio.get_running_loop().time() + max(seconds, LEAST_WAIT)
        self.on_change()

    def cut(self) -> None:
        """Tell whoever waits for it that it is gone."""
        for task in self._working - self._cut:
            self._cut.add(task)
            task.cancel()

    async def watch(self) -> None:
        """For ever: see whether it is back when it is away, and whether it lives when it is silent."""
        silent, failures, heard = 0.0, 0, -1
        while True:
            await asyncio.sleep(LOOK)
            silent = 0.0 if self.heard != heard or not self._working else silent + LOOK
            heard = self.heard
            if self.away is None and silent < SILENCE:
                failures = 0
                continue
            why = await self._ails()
            failures = 0 if why is None else failures + 1
            if why is None:
                self._is_there()
            elif self.away is not None or failures > 1:
                self.rest(why)
                if silent >= SILENCE:  # one that is told to end may still finish what it has
                    self.cut()

    async def _ails(self) -> str | None:
        """Why it cannot be had; None where nothing is wrong."""
        try:
            await self.look()
        except Exception as cause:
            is_full = isinstance(cause, BusyError) and not cause.ails and self.flavour is not None
            return None if is_full else said(cause)
        return None

    def _is_there(self) -> None:
        self.heard += 1
        if self.away is not None:
            self.away, self.held_until = None, 0.0
            logger.warning("The server %s is back.", self.url)
            self.on_change()


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
                raise _other_kind(server)
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


def _other_kind(server: Server) -> EngineStartError:
    kinds = [found.owner if found else "" for found in (server.flavour, server.expected)]
    return EngineStartError(
        f"The servers of a group must be of one kind: {server.url} is {kinds[0]!r} and others are {kinds[1]!r}. Ask it "
        "by a bridge of its own, or give flavour= for what they have in common."
    )


def _has_succeeded(look: asyncio.Task[None]) -> bool:
    return look.done() and not look.cancelled() and look.exception() is None


def _is_cancelled(error: object) -> bool:
    return isinstance(error, asyncio.CancelledError)


def _has_answered(error: object) -> bool:
    return not isinstance(error, AwayError) or error.answered


def _tasks(told: Any) -> frozenset[Task]:
    """What ``lmbridge serve`` says of its models; others say nothing."""
    tasks = told.get("tasks") if isinstance(told, dict) else None
    return frozenset(tasks) & {"generate", "embed", "rerank"} if isinstance(tasks, list) else frozenset()
