"""The storm's engine: a scripted one with flaws, drawn for each request.

Rule: server thread only, but for the cues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from lmbridge.engines.base import Sink
from lmbridge.engines.batching import Batcher
from lmbridge.errors import EngineError
from lmbridge.messages import Delta, Request, Task, Usage, prompt_text
from lmbridge.testing.scripted import ScriptedEngine, echo
from lmbridge.testing.storm.jobs import done

FLAWS: Mapping[str, float] = {
    "refuses": 0.006,
    "stumbles": 0.006,
    "fails": 0.006,
    "answers_at_once": 0.006,
    "ends_and_raises": 0.004,
    "babbles": 0.004,
    "forgets": 0.0004,
}
"""How often a request meets which flaw. One that is forgotten and left alone in the engine looks like a stall."""


class StormEngine(ScriptedEngine):
    """Echoes like the scripted engine, does jobs in batches, and misbehaves by chance and on cue."""

    tasks: frozenset[Task] = frozenset({"generate", "embed", "call"})

    def __init__(
        self,
        chance: Random,
        flaws: Mapping[str, float],
        *,
        as_it_starts: Callable[[StormEngine], None] = lambda engine: None,
        close_error: BaseException | None = None,
        **options: Any,
    ) -> None:
        super().__init__(echo, **options)
        self.began = False  # the server thread writes it, anybody reads it; as the next two
        self.closes = 0
        self.left = 0  # requests inside when it was closed
        self.lost = False  # it has blocked its thread until that was given up, so nobody closes it; any thread
        self.dies_adding = False  # cues of any thread, as is the next
        self.dies_aborting = False
        self._chance = chance
        self._flaws = flaws
        self._as_it_starts = as_it_starts
        self._close_error = close_error

        self._poisoned: set[str] = set()  # ids of jobs that fail; server thread only, as is the next
        self._batcher: Batcher[Request] = Batcher(self._work_off, max_items=self.max_batch_size)

    @property
    def active(self) -> int:
        return super().active + len(self._batcher)

    async def start(self) -> None:
        self.began = True
        self._as_it_starts(self)
        await super().start()

    def add_request(self, request: Request, sink: Sink) -> None:
        flaw = self._flaw()
        if request.job is not None:
            self._add_job(request, sink, flaw)
        elif flaw is None:
            super().add_request(request, sink)
        else:
            flaw(request, sink)
        if self.dies_adding:
            self.on_death(ValueError("died while a request was added"))

    def abort_request(self, request_id: str) -> None:
        if self.dies_aborting:
            raise ValueError("no abort, by plan")
        if self._stalled or not self._batcher.discard(request_id):
            super().abort_request(request_id)

    def progress(self, request_id: str) -> int | None:
        return self._batcher.batches if request_id in self._batcher else super().progress(request_id)

    async def close(self) -> None:
        self.left, self.closes = self.active, self.closes + 1
        self._batcher.close()
        await super().close()
        if self._close_error is not None:
            raise self._close_error

    def _flaw(self) -> Callable[[Request, Sink], None] | None:
        roll = self._chance.random()
        for name, share in self._flaws.items():
            if roll < share:
                return getattr(self, f"_{name}")  # type: ignore[no-any-return]
            roll -= share
        return None

    # --- jobs ---

    def _add_job(self, request: Request, sink: Sink, flaw: Callable[[Request, Sink], None] | None) -> None:
        if flaw in (self._refuses, self._stumbles):
            flaw(request, sink)
        if flaw is not None:
            self._poisoned.add(request.id)
        self._batcher.add(request.id, request, sink)

    async def _work_off(self, requests: list[Request]) -> list[Any]:
        await asyncio.sleep(self._step_time)
        if self._stalled:
            await asyncio.get_running_loop().create_future()
        if not self._poisoned.isdisjoint(request.id for request in requests):
            raise ValueError("a poisoned job, by chance")
        return [done(request.job) for request in requests if request.job is not None]

    # --- flaws ---

    def _refuses(self, request: Request, sink: Sink) -> None:
        raise EngineError("refused by chance")

    def _stumbles(self, request: Request, sink: Sink) -> None:
        raise self._chance.choice([ValueError, SystemExit, asyncio.CancelledError, KeyboardInterrupt])("by chance")

    def _fails(self, request: Request, sink: Sink) -> None:
        self.fail(prompt_text(request.prompt), ValueError("failed by chance"))
        super().add_request(request, sink)

    def _answers_at_once(self, request: Request, sink: Sink) -> None:
        pieces = echo(request)[: request.config.max_new_tokens]
        reason = "stop" if len(pieces) == len(echo(request)) else "length"
        ids, usage = list(range(1, len(pieces) + 1)), Usage(1, len(pieces))
        sink(Delta("".join(pieces), ids, finish_reason=reason, usage=usage))  # type: ignore[arg-type]

    def _ends_and_raises(self, request: Request, sink: Sink) -> None:
        self._answers_at_once(request, sink)
        raise ValueError("after the last delta, by chance")

    def _babbles(self, request: Request, sink: Sink) -> None:
        """Goes on after the last delta."""
        loop = asyncio.get_running_loop()

        def heard(delta: Delta) -> None:
            sink(delta)
            if delta.finish_reason is not None:
                sink(Delta("babble", [0]))
                loop.call_soon(sink, Delta("babble", [0], finish_reason="stop"))

        super().add_request(request, heard)

    def _forgets(self, request: Request, sink: Sink) -> None:
        self.forget(prompt_text(request.prompt))
        super().add_request(request, sink)
