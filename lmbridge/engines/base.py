"""The engine contract: what the server asks of an engine, and what an engine tells the server.

Rule: every method here but ``where`` is called on the server thread only, with the server's loop running. An engine is
*pushed* to (``add_request``) and pushes back (``sink``); it never lets requests queue inside, because the server hands
over at most ``max_batch_size`` of them. Engines know this module, ``messages``, ``errors`` and ``standing``, and import
their own library inside.
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
"""Seconds that an iterator may take to clean up, after its last delta or an abort, before its sink hears the end."""
CLOSE_PATIENCE = 3.0
"""Seconds that all iterators may take to end when the engine is closed; the others are left behind."""

T = TypeVar("T")

Sink = Callable[[Delta], None]
"""Takes one request's deltas, on the server thread; the last carries a finish_reason or an error."""


class Party(Protocol):
    """An engine's share of a device that several work on. Its own threads ask for turns, never the server's."""

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Blocks until it is this engine's turn; the turn lasts as long as the ``with``."""

    def share(self) -> float | None:
        """For how many seconds a turn should last now, at most; None while nobody else is at work on the device."""

    def pause(self) -> float:
        """In the midst of a turn, on its thread: let those who wait have theirs first; how many seconds they took."""

    @property
    def waiting(self) -> bool:
        """Whether a thread of this engine waits for its turn now. Takes no lock."""


class _Alone:
    """Nobody else works on the device."""

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
    """A package that an engine drives, as ``lmbridge doctor`` lists it.

    Attributes:
        package: its name in the package index.
        tried: the versions that the engine was run with, in words.
        install: the command that brings it.
        builds: other packages that bring the same module, for CPUs say.
    """

    package: str
    tried: str
    install: str
    builds: tuple[str, ...] = ()


class Engine(ABC):
    """A model that works on many requests at once.

    An author overrides either ``generate`` (an async iterator; the base class runs it in a task and leaving it is the
    abort) or the pair ``add_request`` and ``abort_request`` where the library pushes results itself.

    ``__init__`` must be cheap: it checks options and remembers them. Loading belongs into ``start``.

    Attributes:
        name: the engine's name in messages.
        libraries: the packages that it drives.
        tasks: what it does: ``generate``, ``embed``, ``rerank``, ``call``. Others are refused by name.
        supports: the GenerationConfig fields it honours; the others are refused by name.
        max_batch_size: how many requests it works on at once.
        party: set by the server before the start: the engine's turns on its device.
        on_death: set by the server; call it with the cause, from any thread, when the engine cannot go on. The
            requests inside need no delta then.
        on_busy: set by the server; call it on the server thread with seconds for which the engine takes no further
            request, since whoever computes for it is full. The last call counts, and 0 ends it.
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
        """Load the model. What takes over 10 ms runs on a worker thread (``EngineThread``), so that the loop lives.

        Raises:
            Exception: the engine cannot be used; it is closed then and never asked again.
        """

    def check(self, request: Request) -> None:
        """Refuse what cannot be honoured, before the request takes a place in the batch.

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
        """Begin the request and return at once; ``sink`` gets its deltas later, the last one always.

        It runs in the caller's context variables.

        Raises:
            LMBridgeError: the request alone is at fault; the engine goes on with the others.
        """
        self._pumps.add(_Pump(self, request, sink))

    def abort_request(self, request_id: str) -> None:
        """Stop the request and free what it holds, within two more steps. Unknown ids are ignored.

        Its sink gets one last delta with finish_reason ``abort``, now or soon.
        """
        for pump in self._pumps:
            if pump.request.id == request_id:  # two have it while one, which has ended, still cleans up
                pump.abort()

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas, the last with a finish_reason. Cancellation at a yield or await is the abort.

        What is freed in a ``finally`` is free when the server hears of the end, unless that takes over
        ``CLEANUP_PATIENCE`` seconds.
        """
        raise TypeError(f"{type(self).__name__} must override generate(), or add_request() and abort_request().")

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text; "" for one that has none or that the engine cannot tell."""
        return [""] * len(token_ids)

    def progress(self, request_id: str) -> int | None:
        """Any number that changes while the engine works on the request, whether or not it says anything of it.

        A prompt that is read in chunks, or text that is held back, shows here. None: not known, or no such request; the
        request is judged by its deltas then. The server asks about requests that have been silent, twice a second.
        """
        return None

    def where(self) -> str:
        """Where the engine's own thread stands, in a few words, for the message of a stall; "" where there is none.

        Unlike the other methods it may be called by any thread, and it waits for nothing.
        """
        return ""

    def estimate(self) -> int | None:
        """Bytes of its device that the model will need, asked before ``start`` on a worker thread; None: not known."""
        return None

    def footprint(self) -> int | None:
        """Bytes of its device that the model holds, asked after ``start``; None: not known."""
        return None

    def stats(self) -> dict[str, float]:
        """Numbers of the engine itself: ``in_flight``, ``steps``, ``tokens`` and what else it counts."""
        return {"in_flight": float(len(self._pumps))}

    async def close(self) -> None:
        """Stop everything and free the model. Called once, also after a failed start; in-flight requests are lost."""
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
        """The requests that run by ``generate``, and those whose iterator still cleans up; server thread only."""
        return set()

    @property
    def _running(self) -> dict[str, asyncio.Task[None]]:
        """The task of each request that runs by ``generate``; server thread only."""
        return {pump.request.id: pump.task for pump in self._pumps}


class _Pump:
    """One request's ``generate`` into its sink. Whatever happens, the sink hears one last delta, and nothing after it.

    What the last delta says is decided by the first of: the iterator, its failure, an abort. It is told when the
    iterator has cleaned up, or when that takes too long. Server thread only.
    """

    def __init__(self, engine: Engine, request: Request, sink: Sink) -> None:
        self.request = request
        self._engine = engine
        self._sink = sink
        self._last: Delta | None = None  # once it is decided
        self._told = False
        self._patience: asyncio.TimerHandle | None = None  # there from the decision on
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
                if self._last is not None:  # or it was aborted, and has swallowed the cancellation
                    break
                self._sink(delta)
            else:
                self._decide(Delta(error=EngineError(f"{self._engine.name} ended the answer without a finish_reason.")))
        except GeneratorExit:  # the loop has been closed with the task in it
            raise
        except LMBridgeError as error:
            self._decide(Delta(error=error))
        except BaseException as cause:  # SystemExit too, which would otherwise take the loop with it
            self._decide(Delta(error=engine_error(f"{self._engine.name} failed: {shown(cause)}.", cause)))
        await self._clean_up(deltas)
        self._tell()

    def _decide(self, last: Delta) -> None:
        """The first decision counts: what an iterator does after it was aborted concerns nobody."""
        if self._last is None:
            self._last = last
            self._patience = self._loop.call_later(CLEANUP_PATIENCE, self._lose_patience)

    async def _clean_up(self, deltas: Any) -> None:
        close = getattr(deltas, "aclose", None)  # iterators that are no generators need not have it
        if close is not None:
            try:
                await close()
            except GeneratorExit:
                raise
            except BaseException as cause:  # the answer is none the worse for it
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
            logger.exception("The end of request %s could not be told.", self.request.id)

    def _warn(self, what: str) -> None:
        logger.warning("generate() of the engine %s for request %s %s.", self._engine.name, self.request.id, what)


def engine_error(message: str, cause: BaseException) -> EngineError:
    """An EngineError with its cause chained, made without raising it."""
    error = EngineError(message)
    error.__cause__ = cause
    return error
