"""A function that answers prompts: turns what it returns or yields into deltas.

Rule: server thread, except plain functions and generators; each has its own thread while it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

from lmbridge.engines.function.naming import is_async, takes_config
from lmbridge.engines.thread import EngineThread
from lmbridge.log import shown
from lmbridge.messages import Delta, Request

_END = object()


class Texts:
    """Calls the function for each request.

    Args:
        function: takes the prompt, and the request's config by name if it has a parameter ``config``.
        in_turn: runs a callable in the engine's turn on its device, on an engine thread.
        most: the most threads. One stuck in the function is not replaced: later requests wait, until the engine itself
            counts as stalled.
        label: for the names of threads.
    """

    def __init__(self, function: Callable[..., Any], in_turn: Callable[..., Any], most: int, label: str) -> None:
        self._function = function
        self._in_turn = in_turn
        self._label = label
        self._is_async = is_async(function)
        self._takes_config = takes_config(function)
        self._most = most
        self._idle: asyncio.Queue[EngineThread] = asyncio.Queue()
        self._all: list[EngineThread] = []

    async def answer(self, request: Request) -> AsyncIterator[Delta]:
        """The deltas of an answer, the last with a finish_reason."""
        given = {"config": request.config} if self._takes_config else {}
        pieces = self._on_loop(request, given) if self._is_async else self._on_thread(request, given)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                delta = _delta(piece)
                yield delta
                if delta.finish_reason is not None:
                    return
        yield Delta(finish_reason="stop")

    def close(self) -> None:
        """Let the threads end; a stuck one is left behind."""
        for thread in self._all:
            thread.close()

    async def _on_loop(self, request: Request, given: dict[str, Any]) -> AsyncGenerator[Any, None]:
        result = self._function(request.prompt, **given)
        if inspect.isawaitable(result):
            result = await result
        if not hasattr(result, "__aiter__"):
            yield result
            return
        try:
            async for piece in result:
                yield piece
        finally:
            if (close := getattr(result, "aclose", None)) is not None:
                await close()

    async def _on_thread(self, request: Request, given: dict[str, Any]) -> AsyncGenerator[Any, None]:
        thread = await self._free_thread()
        pieces: Iterator[Any] | None = None
        try:
            result = await thread.run(self._in_turn, functools.partial(self._function, **given), request.prompt)
            pieces = _pieces(result)
            while (piece := await thread.run(self._in_turn, next, pieces, _END)) is not _END:
                yield piece
        finally:
            await self._put_back(thread, pieces)

    async def _free_thread(self) -> EngineThread:
        if self._idle.empty() and len(self._all) < self._most:
            self._all.append(EngineThread(f"lmbridge {self._label}"))
            return self._all[-1]
        return await self._idle.get()

    async def _put_back(self, thread: EngineThread, pieces: Iterator[Any] | None) -> None:
        """Return the thread once the function, which cannot be interrupted, has finished the request."""

        def is_free(closing: asyncio.Future[None]) -> None:
            if not closing.cancelled():
                closing.exception()  # retrieved, in case nobody waits for it
            self._idle.put_nowait(thread)

        closing = asyncio.ensure_future(thread.run(_close, pieces))
        closing.add_done_callback(is_free)
        await asyncio.shield(closing)


def _pieces(result: Any) -> Iterator[Any]:
    if isinstance(result, (str, Delta)):
        return iter([result])
    if inspect.isawaitable(result) or hasattr(result, "__aiter__"):
        raise TypeError("it returned an awaitable; declare it `async def`, so that it runs on the loop")
    try:
        return iter(result)
    except TypeError:
        raise TypeError(f"it returned {shown(result)} instead of a string or an iterator of strings") from None


def _close(pieces: Any) -> None:
    close = getattr(pieces, "close", None)
    if close is not None:
        close()


def _delta(piece: Any) -> Delta:
    if isinstance(piece, Delta):
        return piece
    if isinstance(piece, str):
        return Delta(piece)
    raise TypeError(f"it yielded {shown(piece)} instead of a string or a Delta")
