"""One server: whether it is available, what it serves, and which tasks wait for it.

Rule: server thread only. A server that is away gets no requests and is polled in the background; one that reports being
full gets none for as long as it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lmbridge.engines.openai.errors import AwayError, BusyError, in_our_words
from lmbridge.engines.openai.flavours import Flavour, flavour_of
from lmbridge.engines.openai.library import get
from lmbridge.errors import EngineStartError
from lmbridge.log import logger, said
from lmbridge.messages import Task

LOOK = 1.0
"""Seconds between polls of a server that is away."""
SILENCE = 2.0
"""Seconds of silence on its requests after which a server is checked."""
LEAST_WAIT = 0.1
"""The least seconds for which a full server gets no requests."""


class Server:
    """One server.

    Attributes:
        url: for messages.
        model: its name for the model; known once it has answered.
        flavour: its kind, as it reports.
        tasks: its model's tasks; empty if not reported.
        offers: the tasks of each of its models.
        away: why it gets no requests; None if it does.
        held_until: by the loop's clock: it asked for no requests until then.
        heard: rises with everything it sends, and with every successful check.
        unwanted: fields that it rejects.
        expected: the kind of the others; None: any.
        on_change: called when it goes away, comes back, or is full.
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
        self._working: set[asyncio.Task[Any]] = set()  # waiting for it
        self._cut: set[asyncio.Task[Any]] = set()  # those of them being told that it is gone

    @property
    def in_flight(self) -> int:
        return len(self._working)

    @property
    def trouble(self) -> str:
        """Its address and why it does not serve."""
        why = self.away or "it does not serve"
        return why if self.url in why else f"{self.url}: {why}"

    async def look(self) -> None:
        """Ask it for its models, and choose the named one, or the first that supports the task.

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
            raise other_kind(self)
        self.tasks = self.offers[chosen] or self.tasks

    def _choose(self) -> str | None:
        """Keep the current model if possible. Models without reported tasks come last."""
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
        """Register the current task as waiting for this server.

        Raises:
            AwayError: the server was found to be gone meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        self._working.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut or task.uncancel() > 0:  # it was also aborted
                raise
            raise AwayError(self.away or "it does not answer", broke=True) from None
        finally:
            self._working.discard(task)
            self._cut.discard(task)

    def rest(self, why: str) -> None:
        """Send it no requests until it is back."""
        if self.away is None:
            logger.warning("The server %s is away: %s. Retrying every %g s.", self.url, why, LOOK)
            self.away = why
            self.on_change()
        self.away = why

    def hold(self, seconds: float) -> None:
        """Send it no requests for ``seconds``: it is full."""
        self.held_until = asyncio.get_running_loop().time() + max(seconds, LEAST_WAIT)
        self.on_change()

    def cut(self) -> None:
        """Tell all waiting tasks that it is gone."""
        for task in self._working - self._cut:
            self._cut.add(task)
            task.cancel()

    async def watch(self) -> None:
        """Forever: check whether it is back while away, and whether it is alive while silent."""
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
                if silent >= SILENCE:  # a server shutting down may still finish its requests
                    self.cut()

    async def _ails(self) -> str | None:
        """Why it is unavailable; None if nothing is wrong."""
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


def other_kind(server: Server) -> EngineStartError:
    kinds = [found.owner if found else "" for found in (server.flavour, server.expected)]
    return EngineStartError(
        f"The servers of a group must be of one kind: {server.url} is {kinds[0]!r} and others are {kinds[1]!r}. Use it "
        "in a separate Bridge, or set flavour= to what they have in common."
    )


def _tasks(told: Any) -> frozenset[Task]:
    """The tasks that ``lmbridge serve`` reports; other servers report none."""
    tasks = told.get("tasks") if isinstance(told, dict) else None
    return frozenset(tasks) & {"generate", "embed", "rerank"} if isinstance(tasks, list) else frozenset()
