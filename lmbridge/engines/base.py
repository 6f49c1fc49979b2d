"""The engine contract: what the server asks of an engine, and what an engine tells the server.

Rule: every method here but ``where`` is called on the server thread only, with the server's loop running. An engine is
*pushed* to (``add_request``) and pushes back (``sink``); it never lets requests queue inside, because the server hands
over at most ``max_batch_size`` of them. Engines know this module, ``messages``, ``errors`` and ``standing``, and import
their own library inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar, TypeVar, cast

from lmbridge.errors import EngineError, LMBridgeError, UnsupportedOptionError
from lmbridge.messages import Delta, Request

T = TypeVar("T")

Sink = Callable[[Delta], None]
"""Takes one request's deltas, on the server thread; the last carries a finish_reason or an error."""


class Engine(ABC):
    """A language model that works on many requests at once.

    An author overrides either ``generate`` (an async iterator; the base class runs it in a task and leaving it is the
    abort) or the pair ``add_request`` and ``abort_request`` where the library pushes results itself.

    ``__init__`` must be cheap: it checks options and remembers them. Loading belongs into ``start``.

    Attributes:
        name: the engine's name in messages.
        supports: the GenerationConfig fields it honours; the others are refused by name.
        max_batch_size: how many requests it works on at once.
        on_death: set by the server; call it with the cause, on the server thread, when the engine cannot go on. The
            requests inside need no delta then.
    """

    name: ClassVar[str] = "engine"
    supports: ClassVar[frozenset[str]] = frozenset({"max_new_tokens"})
    max_batch_size: int = 64

    on_death: Callable[[BaseException], None] = staticmethod(lambda cause: None)

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
        task = asyncio.get_running_loop().create_task(self._run(request, sink), name=f"lmbridge {request.id}")
        self._running[request.id] = task
        task.add_done_callback(lambda done: self._running.pop(request.id, None))

    def abort_request(self, request_id: str) -> None:
        """Stop the request and free what it holds, within two more steps. Unknown ids are ignored.

        Its sink gets one last delta with finish_reason ``abort``, now or soon.
        """
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Yield the request's deltas, the last with a finish_reason. Cancellation at a yield or await is the abort."""
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

    def stats(self) -> dict[str, float]:
        """Numbers of the engine itself: ``in_flight``, ``steps``, ``tokens`` and what else it counts."""
        return {"in_flight": float(len(self._running))}

    async def close(self) -> None:
        """Stop everything and free the model. Called once, also after a failed start; in-flight requests are lost."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _running(self) -> dict[str, asyncio.Task[None]]:
        """The task of each request that runs by ``generate``; server thread only."""
        return self.__dict__.setdefault("_tasks", {})  # type: ignore[no-any-return]

    async def _run(self, request: Request, sink: Sink) -> None:
        """Pump one ``generate`` into its sink; whatever happens, the sink hears one last delta."""
        last = Delta(error=EngineError(f"{self.name} ended the answer without a finish_reason."))
        try:
            async with contextlib.aclosing(self.generate(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    if delta.finish_reason is not None or delta.error is not None:
                        last = delta
                        break
                    sink(delta)
        except asyncio.CancelledError:
            last = Delta(finish_reason="abort")
        except LMBridgeError as error:
            last = Delta(error=error)
        except BaseException as cause:  # SystemExit too, which would otherwise take the loop with it
            last = Delta(error=engine_error(f"{self.name} failed: {cause!r}.", cause))
        sink(last)


def engine_error(message: str, cause: BaseException) -> EngineError:
    """An EngineError with its cause chained, made without raising it."""
    error = EngineError(message)
    error.__cause__ = cause
    return error


class EngineThread:
    """The one worker thread of an engine: what blocks runs there in order, while the loop serves on.

    It is a daemon of our own rather than an executor: the interpreter joins executor threads before atexit runs, and a
    model that is stuck in native code would then hold the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # server thread only

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args)`` on the thread and await what it returns or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: Exception | None) -> None:
            if future.done():  # its waiter was cancelled
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast(T, result))

        def job() -> None:
            result, error = None, None
            try:
                result = function(*args)
            except Exception as raised:
                error = raised
            except BaseException as raised:  # some libraries call exit() when they cannot load
                error = RuntimeError(f"{raised!r} on the engine's thread")
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile: nobody waits
                loop.call_soon_threadsafe(tell, result, error)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return await future

    def close(self) -> None:
        """Let the thread end after the jobs it has."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or its results would live until the next job
