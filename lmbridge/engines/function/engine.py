"""The function engine: its options, and the batches of list functions.

Rule: server thread, except ``_call`` and ``_in_turn``, which run on a thread of the engine's own.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

from lmbridge.engines.base import Engine, Sink
from lmbridge.engines.batching import Batcher
from lmbridge.engines.function.naming import BUILDER, find_function, is_async, takes_config, yields
from lmbridge.engines.function.texts import Texts
from lmbridge.engines.thread import EngineThread, giving_way
from lmbridge.errors import InvalidRequestError
from lmbridge.log import shown
from lmbridge.messages import Apply, Delta, GenerationConfig, Request, Task
from lmbridge.values import as_int, as_number, as_rows

Function = Callable[..., Any]
"""From a list of items to as many results, as a sequence, an array, or an awaitable of one; or from a prompt to its
answer."""


class FunctionEngine(Engine):
    """Batches the items of ``bridge.call`` and ``bridge.map`` for a function, or lets it answer prompts.

    A batch that raises is halved until only the items that raise on their own have failed, so the function may see an
    item more than once. It may also return an exception in an item's place.

    Args:
        function: takes a list of at most ``max_batch_size`` items and returns a list of as many results; or takes a
            prompt, and returns its answer or yields pieces of it, as strings or Deltas. A parameter ``config`` receives
            the request's GenerationConfig. Or a name, ``"module:name"``.
        task: ``"call"`` for lists, ``"generate"`` for prompts; None: prompts if it yields, otherwise lists.
        max_batch_size: the most items in a batch, or prompts at once. A plain function that answers prompts gets a
            thread for each.
        batch_timeout: seconds for which a batch that is not full waits for more items; 0 runs what is there.
        supports: the GenerationConfig fields that a function with ``config`` honours, as a list or separated by commas;
            others are refused by name.
        name: the engine's name in messages.
    """

    name: ClassVar[str] = "function"
    supports: ClassVar[frozenset[str]] = frozenset()
    tasks: frozenset[Task] = frozenset({"call"})

    def __init__(
        self,
        function: Function | str,
        *,
        task: Literal["call", "generate"] | None = None,
        max_batch_size: int = 32,
        batch_timeout: float = 0.0,
        supports: Iterable[str] = (),
        name: str | None = None,
    ) -> None:
        function = find_function(function)
        self.tasks = frozenset({_checked_task(task) or ("generate" if yields(function) else "call")})
        self.supports = _checked_fields(supports, function)  # type: ignore[misc]  # this one's own
        self.max_batch_size = _checked_size(max_batch_size)
        self._wait = _checked_wait(batch_timeout)
        self._function = function
        if name is not None:
            self.name = _checked_name(name)  # type: ignore[misc]  # this one's own
        self._label = name or str(getattr(function, "__name__", type(function).__name__))
        self._is_async = is_async(function)
        self._texts = Texts(function, self._in_turn, self.max_batch_size, self._label)
        self._thread = EngineThread(f"lmbridge {self._label}")
        weakref.finalize(self, self._thread.close).atexit = False
        self._batcher: Batcher[Any] | None = None

    def describe(self) -> str:
        return f"{self._label} (a function)"

    async def start(self) -> None:
        self._batcher = Batcher(self._run, max_items=self.max_batch_size, wait=self._wait)

    def add_request(self, request: Request, sink: Sink) -> None:
        assert self._batcher is not None
        if request.job is None:
            super().add_request(request, sink)
            return
        assert isinstance(request.job, Apply)
        self._batcher.add(request.id, request.job.item, sink, client=request.client)

    def abort_request(self, request_id: str) -> None:
        super().abort_request(request_id)
        if self._batcher is not None:
            self._batcher.discard(request_id)

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        return self._texts.answer(request)

    def progress(self, request_id: str) -> int | None:
        batcher = self._batcher
        return batcher.batches if batcher is not None and request_id in batcher else None

    def stats(self) -> dict[str, float]:
        """``in_flight``, ``batches`` and ``items`` so far, and ``max_batch_size``."""
        batcher = self._batcher
        return {
            "in_flight": float(len(self._running) + (len(batcher) if batcher is not None else 0)),
            "batches": float(batcher.batches if batcher is not None else 0),
            "items": float(batcher.items if batcher is not None else 0),
            "max_batch_size": float(self.max_batch_size),
        }

    async def close(self) -> None:
        if self._batcher is not None:
            self._batcher.close()
        await super().close()
        self._texts.close()
        self._thread.close()

    async def _run(self, items: list[Any]) -> Sequence[Any]:
        if self._is_async:
            return _listed(await self._function(items))
        return await self._thread.run(self._call, items, while_awaited=True)

    def _call(self, items: list[Any]) -> Sequence[Any]:
        """On the engine's thread."""
        results = self._in_turn(self._function, items)
        if inspect.isawaitable(results):
            raise TypeError("it returned an awaitable; declare it `async def`, so that it runs on the loop")
        return _listed(results)

    def _in_turn(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On the engine's thread: call the function during this engine's turn on its device."""
        with contextlib.ExitStack() as turn:
            turn.enter_context(self.party.turn())
            with giving_way(turn.close):
                return function(*args, **kwargs)


def function_engine(
    function: Function | str,
    *,
    task: Literal["call", "generate"] | None = None,
    max_batch_size: int = 32,
    batch_timeout: float = 0.0,
    supports: Iterable[str] = (),
    name: str | None = None,
) -> Callable[[], FunctionEngine]:
    """A builder of the function's engine, for ``Bridge(function_engine(process_batch))``; see ``FunctionEngine``.

    Raises:
        InvalidRequestError: an argument is invalid.
    """

    def build() -> FunctionEngine:
        return FunctionEngine(
            function,
            task=task,
            max_batch_size=max_batch_size,
            batch_timeout=batch_timeout,
            supports=supports,
            name=name,
        )

    build.__name__ = build()._label  # which also validates the arguments
    setattr(build, BUILDER, True)
    return build


def _listed(results: Any) -> list[Any]:
    """A plain list, made on the function's thread: reading foreign results may run their code."""
    rows = as_rows(results)
    if rows is None:
        raise TypeError(f"it returned {shown(results)} instead of a list of results")
    return list(rows)


def _checked_task(value: Any) -> Task | None:
    if value not in (None, "call", "generate"):
        raise InvalidRequestError(f"task must be 'call' or 'generate', not {shown(value)}.", "task")
    task: Task | None = value
    return task


def _checked_fields(names: Any, function: Function) -> frozenset[str]:
    fields = frozenset(filter(None, map(str.strip, names.split(","))) if isinstance(names, str) else names)
    known = frozenset(GenerationConfig().__dict__)
    for name in fields - known:
        raise InvalidRequestError(f"supports must name fields of GenerationConfig, not {shown(name)}.", "supports")
    if fields and not takes_config(function):
        raise InvalidRequestError(
            f"The function cannot honour {', '.join(sorted(fields))} without seeing them: give it a parameter named "
            "config, or leave supports out.",
            "supports",
        )
    return fields


def _checked_size(value: Any) -> int:
    size = as_int(value)
    if size is None or size < 1:
        raise InvalidRequestError(f"max_batch_size must be an int >= 1, not {shown(value)}.", "max_batch_size")
    return size


def _checked_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"name must be a non-empty string, not {shown(value)}.", "name")
    return value


def _checked_wait(value: Any) -> float:
    seconds = as_number(value)
    if seconds is None or not 0 <= seconds < float("inf"):
        raise InvalidRequestError(f"batch_timeout must be seconds >= 0, not {shown(value)}.", "batch_timeout")
    return seconds
