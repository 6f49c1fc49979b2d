"""One replica of the Ray engine: any engine under a Bridge of its own, in a process that Ray Serve started somewhere.

It stands above the bridge, which it uses as any program does; the engine that has it started knows it by name.

Rule: runs in the replica's process, on Serve's loop there, and knows no Ray. What it says pickles: an error is the last
delta's, as in any engine. The Bridge in here restarts a dead engine, finds a stuck one, and lets requests of several
processes take turns; what it cannot repair, Serve replaces with the process.
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
"""Seconds between two deltas of a stream, for each stream that runs: Ray takes about a thousand a second to a process,
and what a stream says meanwhile goes together."""

InnerEngine = str | Callable[..., Engine]
"""An engine's name, or what builds one from the model and the options."""


class Replica:
    """Serves one copy of the model.

    Args:
        model: what the inner engine takes.
        inner_engine: see ``InnerEngine``.
        places: how many requests it takes at once, for those who ask.
        options: the inner engine's.
    """

    def __init__(self, model: Any, inner_engine: InnerEngine, places: int, options: dict[str, Any]) -> None:
        self._places = places
        self._streams = 0  # that run now; Serve's loop only
        if isinstance(inner_engine, str):
            self._bridge = Bridge(model, inner_engine, **options)
        else:
            self._bridge = Bridge(functools.partial(inner_engine, model, **options))
        self._bridge.start()

    def about(self) -> dict[str, Any]:
        """What a process that sends requests here has to know."""
        return {
            "supports": self._bridge.supports(),
            "tasks": self._bridge.tasks(),
            "description": self._bridge.describe(),
            "places": self._places,
        }

    def stats(self) -> dict[str, float]:
        """What the inner engine counts of itself."""
        return self._bridge.stats()

    async def generate(self, errand: Errand) -> AsyncIterator[Delta]:
        """The deltas of an answer, the last with a finish_reason or an error. Cancellation is the abort."""
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
        """The stream's deltas, the first at once, the others not more often than Ray takes them."""
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
        """What a job gives, by the verb it came from."""
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
        """Asked by Serve, which replaces a replica for which this raises."""
        health = self._bridge.health()
        if health.state in ("failed", "closed"):
            raise RuntimeError(f"The bridge of this replica has {health.state}: {health.reason or 'it serves no more'}")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not built
            self._bridge.close(timeout=0.0)
