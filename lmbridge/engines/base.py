"""The engine contract: what the server requires of an engine, and what an engine reports.

Rule: every method here except ``where`` is called only on the server thread, with the server's loop running. The server
pushes requests (``add_request``) and the engine pushes deltas back (``sink``); requests never queue inside an engine,
because the server hands over at most ``max_batch_size``. Engines know this module, ``messages``, ``errors`` and
``standing``, and import their own library inside functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from lmbridge.errors import EngineError, LMBridgeError, UnsupportedOptionError
from lmbridge.log import logger, shown
from lmbridge.messages import Delta, Request, Task

CLEANUP_PATIENCE = 2.0
"""Seconds that an iterator may take to clean up after its last delta or an abort, before the sink gets the end."""
CLOSE_PATIENCE = 3.0
"""Seconds that iterators may take to end when the engine is closed; then they are left behind."""

T = TypeVar("T")

Sink = Callable[[Delta], None]
"""Takes one request's deltas, on the server thread; the last carries a finish_reason or an error."""


class Party(Protocol):
    """An engine's access to a shared device. Only its own threads ask for turns, never the server's."""

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Block until it is this engine's turn; the turn lasts as long as the ``with`` block."""

    def share(self) -> float | None:
        """The most seconds that a turn should last now; None while nobody else uses the device."""

    def pause(self) -> float:
        """In the middle of a turn, on its thread: let waiters go first; returns the seconds that took."""

    @property
    def waiting(self) -> bool:
        """Whether a thread of this engine waits for its turn now. Takes no lock."""


class _Alone:
    """The Party of an engine that has its device to itself."""

    def turn(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def share(self) -> float | None:
        return None

    def pause(self) -> float:
        return 0.0

    @property
    def waiting(self) -> bool:
        return False


@dataclass(frozen=True)
class Library:
    """A package that an engine uses, as listed by ``lmbridge doctor``.

    Attributes:
        package: its name on PyPI.
        tried: the tested versions, as text.
        install: the command that installs it.
        builds: other packages with the same module, such as CPU builds.
    """

    package: str
    tried: str
    install: str
    builds: tuple[str, ...] = ()


class Engine(ABC):
    """A model that works on many requests at once.

    Override either ``generate``, an async iterator that the base class runs in a task and leaves to abort, or, if the
    library pushes results itself, the pair ``add_request`` and ``abort_request``.

    ``__init__`` must be cheap: it validates and stores the options. Load the model in ``start``.

    Attributes:
        name: the engine's name in messages.
        libraries: the packages that it uses.
        tasks: any of ``generate``, ``embed``, ``rerank``, ``call``; others are refused by name.
        supports: the GenerationConfig fields that it supports; others are refused by name.
        max_batch_size: how many requests it works on at once.
        party: set by the server before the start: the engine's turns on its device.
        on_death: set by the server; call it with the cause, from any thread, when the engine cannot go on. Its requests
            then need no further delta.
        on_busy: set by the server; call it on the server thread with the seconds for which the engine takes no more
            requests, because a remote server, say, is full. The last call counts; 0 ends it.
    """

    name: ClassVar[str] = "engine"
    libraries: ClassVar[tuple[Library, ...]] = ()
    tasks: frozenset[Task] = frozenset({"generate"})
    supports: ClassVar[frozenset[str]] = frozenset({"max_new_tokens"})
    max_batch_size: int = 64
    party: Party = _Alone()

    on_death: Callable[[BaseException], None] = staticmethod(lambda cause: None)
    on_busy: Callable[[float], None] = staticmethod(lambda seconds: None)

    def describe(self) -> str:
        """The model and its engine in a few words, for ``repr`` and logs."""
        return self.name

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Run anything over 10 ms on a worker thread (``EngineThread``), to keep the loop responsive.

        Raises:
            Exception: the engine cannot be used; it is then closed and discarded.
        """

    def check(self, request: Request) -> None:
        """Refuse an unsupported request before it takes a place in the batch.

        Raises:
            UnsupportedOptionError: a field of the request's config is not in ``supports``.
        """
        for field in request.config.given():
            if field not in self.supports:
                raise UnsupportedOptionError(
                    f"{field} is not supported by the engine {self.name!r}; leave it out, or use another engine.",
                    param=field,
                )

    def add_request(self, request: Request, sink: Sink) -> None:
        """Begin the request and return at once; ``sink`` gets its deltas later, always including a last one.

        Runs with the caller's context variables.

        Raises:
            LMBridgeError: only this request fails; the engine continues with the others.
        """
        self._pumps.add(_Pump(self, request, sink))

    def abort_request(self, request_id: str) -> None:
        """Stop the request and free what it holds, within two more steps. Unknown ids are ignored.

        Its sink gets one last delta with finish_reason ``abort``, now or soon.
        """
        for pump in self._pumps:
            if pump.request.id == request_id:  # two share an id while an ended one still cleans up
                pump.abort()

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas, the last with a finish_reason. An abort cancels it at a yield or await.

        What a ``finally`` frees is free once the server hears of the end, unless it takes over ``CLEANUP_PATIENCE``
        seconds.
        """
        raise TypeError(f"{type(self).__name__} must override generate(), or add_request() and abort_request().")

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; "" if it has none or the engine does not know it."""
        return [""] * len(token_ids)

    def progress(self, request_id: str) -> int | None:
        """Any number that changes while the engine works on the request, even without deltas.

        It shows prompts read in chunks and text held back. None: unknown, or no such request; the request is then
        judged by its deltas. The server asks about silent requests, twice a second.
        """
        return None

    def where(self) -> str:
        """What the engine's own thread is executing, briefly, for stall messages; "" if it has none.

        Unlike the other methods it may be called by any thread; it must not block.
        """
        return ""

    def estimate(self) -> int | None:
        """Device bytes that the model will need; called before ``start`` on a worker thread; None: unknown."""
        return None

    def footprint(self) -> int | None:
        """Device bytes that the model holds; called after ``start``; None: unknown."""
        return None

    def stats(self) -> dict[str, float]:
        """The engine's own counters: ``in_flight``, ``steps``, ``tokens`` and any others."""
        return {"in_flight": float(len(self._pumps))}

    async def close(self) -> None:
        """Stop everything and free the model. Called once, even after a failed start; requests in flight are lost."""
        pumps = list(self._pumps)
        for pump in pumps:
            pump.abort()
        if pumps:
            await asyncio.wait([pump.task for pump in pumps], timeout=CLOSE_PATIENCE)
        for pump in pumps:
            if not pump.task.done():
                logger.warning("The engine %s does not end request %s; it is left behind.", self.name, pump.request.id)

    @functools.cached_property
    def _pumps(self) -> set[_Pump]:
        """Requests run by ``generate``, and those whose iterator still cleans up; server thread only."""
        return set()

    @property
    def _running(self) -> dict[str, asyncio.Task[None]]:
        """The task of each request run by ``generate``; server thread only."""
        return {pump.request.id: pump.task for pump in self._pumps}


class _Pump:
    """Runs one request's ``generate`` into its sink. Whatever happens, the sink gets exactly one last delta.

    The first of iterator, failure and abort decides the last delta. It is sent once the iterator has cleaned up, or
    when that takes too long. Server thread only.
    """

    def __init__(self, engine: Engine, request: Request, sink: Sink) -> None:
        self.request = request
        self._engine = engine
        self._sink = sink
        self._last: Delta | None = None  # once it is decided
        self._told = False
        self._patience: asyncio.TimerHandle | None = None  # set once it is decided
        self._loop = asyncio.get_running_loop()
        self.task = self._loop.create_task(self._run(), name=f"lmbridge {request.id}")
        self.task.add_done_callback(self._on_end)

    def abort(self) -> None:
        """End the iterator, unless it is ending already."""
        if self._last is None:
            self._decide(Delta(finish_reason="abort"))
            self.task.cancel()

    async def _run(self) -> None:
        deltas = None
        try:
            deltas = self._engine.generate(self.request)
            async for delta in deltas:
                if delta.finish_reason is not None or delta.error is not None:
                    self._decide(delta)
                if self._last is not None:  # or it was aborted and swallowed the cancellation
                    break
                self._sink(delta)
            else:
                self._decide(Delta(error=EngineError(f"{self._engine.name} ended the answer without a finish_reason.")))
        except GeneratorExit:  # the loop was closed with the task in it
            raise
        except LMBridgeError as error:
            self._decide(Delta(error=error))
        except BaseException as cause:  # SystemExit too, which would otherwise end the loop
            self._decide(Delta(error=engine_error(f"{self._engine.name} failed: {shown(cause)}.", cause)))
        await self._clean_up(deltas)
        self._tell()

    def _decide(self, last: Delta) -> None:
        """The first decision counts: what an iterator does after an abort is ignored."""
        if self._last is None:
            self._last = last
            self._patience = self._loop.call_later(CLEANUP_PATIENCE, self._lose_patience)

    async def _clean_up(self, deltas: Any) -> None:
        close = getattr(deltas, "aclose", None)  # iterators other than generators may lack it
        if close is not None:
            try:
                await close()
            except GeneratorExit:
                raise
            except BaseException as cause:  # the answer is unaffected
                self._warn(f"failed to clean up: {shown(cause)}")

    def _lose_patience(self) -> None:
        self._warn(f"has not cleaned up within {CLEANUP_PATIENCE:g} s")
        self._tell()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._engine._pumps.discard(self)
        if self._last is None:  # it was cancelled before its first step
            self._decide(Delta(finish_reason="abort"))
        self._tell()

    def _tell(self) -> None:
        if self._told or self._last is None or self._patience is None:
            return
        self._told = True
        self._patience.cancel()
        try:
            self._sink(self._last)
        except BaseException:
            logger.exception("The end of request %s could not be delivered.", self.request.id)

    def _warn(self, what: str) -> None:
        logger.warning("generate() of the engine %s for request %s %s.", self._engine.name, self.request.id, what)


def engine_error(message: str, cause: BaseException) -> EngineError:
    """An EngineError with its cause chained, made without raising it."""
    error = EngineError(message)
    error.__cause__ = cause
    return error
