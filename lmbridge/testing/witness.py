"""Observes an engine's input and output, for tests of any engine.

Rule: works from outside, by wrapping one engine's methods; ``start`` reveals the loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable

from lmbridge.engines.base import Engine, Sink
from lmbridge.messages import Delta, Request

TURNS = 3  # of the loop, within which an engine releases a request after its last delta


class Witness:
    """Observes one engine.

    Attributes:
        said: the deltas of each request that the engine took, by id, in order.
        elsewhere: names of threads other than the server's on which the engine called a sink.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.said: dict[str, list[Delta]] = {}  # written by the server thread under _changed
        self.elsewhere: set[str] = set()  # each entry made in one atomic step
        self._changed = threading.Condition()
        self._thread = 0  # ident of the server thread; set once, by that thread
        self._loop: asyncio.AbstractEventLoop | None = None  # set once, by the server thread, like the next
        self._started = False  # requests before that are the engine's own self-tests
        self._start, self._add = engine.start, engine.add_request
        engine.start, engine.add_request = self._on_start, self._on_add  # type: ignore[method-assign]

    def on_loop(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the loop of an engine that has started."""
        assert self._loop is not None, "the engine has not started"
        self._loop.call_soon_threadsafe(function)

    def in_flight(self, patience: float) -> float:
        """The engine's count of requests once it has ended each one it took.

        Raises:
            AssertionError: it had not ended them after ``patience`` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(map(has_ended, self.said.values())), patience)
            forgotten = [request_id for request_id, deltas in self.said.items() if not has_ended(deltas)]
        assert not forgotten, f"no last delta for {len(forgotten)} requests; the first is {forgotten[0]}"
        answer: concurrent.futures.Future[float] = concurrent.futures.Future()
        self.on_loop(lambda: self._ask(answer, TURNS))
        return answer.result(patience)

    def _ask(self, answer: concurrent.futures.Future[float], turns: int) -> None:
        if turns and self._loop is not None:
            self._loop.call_soon(self._ask, answer, turns - 1)
        else:
            answer.set_result(self.engine.stats()["in_flight"])

    async def _on_start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        await self._start()
        self._started = True

    def _on_add(self, request: Request, sink: Sink) -> None:
        if not self._started:
            self._add(request, sink)
            return
        deltas: list[Delta] = []

        def heard(delta: Delta) -> None:
            if threading.get_ident() != self._thread:
                self.elsewhere.add(threading.current_thread().name)
            with self._changed:
                deltas.append(delta)
                self._changed.notify_all()
            sink(delta)

        with self._changed:
            self.said[request.id] = deltas
        try:
            self._add(request, heard)
        except BaseException:
            with self._changed:
                del self.said[request.id]
            raise


class WitnessedEngines:
    """A factory for ``Bridge(...)`` that observes each engine it builds."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self.witnesses: list[Witness] = []  # one per engine, in order; appended by the building thread
        self._build = build

    def __call__(self) -> Engine:
        self.witnesses.append(Witness(self._build()))
        return self.latest.engine

    @property
    def latest(self) -> Witness:
        return self.witnesses[-1]


def has_ended(deltas: list[Delta]) -> bool:
    """Whether a last delta is among them."""
    return any(delta.finish_reason is not None or delta.error is not None for delta in deltas)
