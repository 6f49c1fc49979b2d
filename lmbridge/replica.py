"""One replica of the Ray engine: any engine under a Bridge of its own, in a process that Ray Serve started somewhere.

It sits above the bridge and uses it as any program does; the Ray engine refers to it by name.

Rule: runs in the replica's process, on Serve's loop there, and knows nothing of Ray. Everything it returns pickles; an
error is the last delta's, as in any engine. Its Bridge restarts a dead engine, detects a stuck one, and gives requests
of several processes turns; what it cannot repair, Serve does by replacing the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from lmbridge.bridge import Bridge
from lmbridge.caller.async_streams import AsyncStream
from lmbridge.engines.base import Engine
from lmbridge.engines.ray.errand import Errand
from lmbridge.errors import LMBridgeError
from lmbridge.messages import Apply, Delta, Job, Rerank

PAUSE = 0.001
"""Seconds between two deltas of each running stream: Ray passes about a thousand messages a second to one process, so
deltas that come in between are merged."""

InnerEngine = str | Callable[..., Engine]
"""An engine's name, or a function that builds one from the model and the options."""


class Replica:
    """Serves one copy of the model.

    Args:
        model: passed to the inner engine.
        inner_engine: see ``InnerEngine``.
        places: how many requests it takes at once, as reported to callers.
        options: passed to the inner engine.
    """

    def __init__(self, model: Any, inner_engine: InnerEngine, places: int, options: dict[str, Any]) -> None:
        self._places = places
        self._streams = 0  # running now; Serve's loop only
        if isinstance(inner_engine, str):
            self._bridge = Bridge(model, inner_engine, **options)
        else:
            self._bridge = Bridge(functools.partial(inner_engine, model, **options))
        self._bridge.start()

    def about(self) -> dict[str, Any]:
        """What a process needs to know to send requests here."""
        return {
            "supports": self._bridge.supports(),
            "tasks": self._bridge.tasks(),
            "description": self._bridge.describe(),
            "places": self._places,
        }

    def stats(self) -> dict[str, float]:
        """The inner engine's counters."""
        return self._bridge.stats()

    async def generate(self, errand: Errand) -> AsyncIterator[Delta]:
        """The deltas of an answer, the last with a finish_reason or an error. Cancelling it aborts."""
        try:
            if errand.job is not None:
                yield await self._do(errand.job, errand.call)
                return
            prompt: Any = errand.prompt
            async with (
                self._bridge.astream(prompt, **errand.call, **errand.config) as stream,
                contextlib.aclosing(self._paced(stream)) as deltas,
            ):
                async for delta in deltas:
                    yield delta
        except LMBridgeError as error:
            error.index = None  # there is no list here
            yield Delta(error=error)

    async def _paced(self, stream: AsyncStream) -> AsyncGenerator[Delta]:
        """The stream's deltas, the first at once, the rest no faster than Ray can pass them on."""
        delta = None
        self._streams += 1
        try:
            async for delta in stream:
                yield delta
                if delta.finish_reason is None:
                    await asyncio.sleep(PAUSE * self._streams)
        finally:
            self._streams -= 1
        if delta is None or delta.finish_reason is None:
            yield Delta(finish_reason=stream.response.finish_reason, usage=stream.response.usage)

    async def _do(self, job: Job, call: dict[str, Any]) -> Delta:
        """Run a job by its verb."""
        bridge = self._bridge
        if isinstance(job, Apply):
            return Delta(value=await bridge.acall(job.item, **call), finish_reason="stop")
        if isinstance(job, Rerank):
            (response,) = await bridge.arerank(job.query, [job.document], details=True, truncate=job.truncate, **call)
        else:
            how: dict[str, Any] = {
                field: getattr(job, field) for field in ("normalize", "dimensions", "prompt", "truncate")
            }
            response = await bridge.aembed(job.text, details=True, **how, **call)
        return Delta(value=response.value, finish_reason="stop", usage=response.usage)

    def check_health(self) -> None:
        """Raise if unhealthy; Serve then replaces this replica."""
        health = self._bridge.health()
        if health.state in ("failed", "closed"):
            raise RuntimeError(f"This replica's bridge is {health.state}: {health.reason or 'it no longer serves'}")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not built
            self._bridge.close(timeout=0.0)
