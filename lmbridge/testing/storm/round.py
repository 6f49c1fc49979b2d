"""One round: a bridge, the engines it builds, and what is left of them at its end.

Rule: what the storm looks into that is not public stands here alone.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from lmbridge.bridge import Bridge
from lmbridge.testing.storm.engine import FLAWS, StormEngine
from lmbridge.testing.storm.judge import Books, Judge
from lmbridge.testing.storm.plan import Plan
from lmbridge.testing.storm.scene import Scene
from lmbridge.testing.storm.watch import GRACE

LOOK = 0.02  # seconds between two looks at something that tells nobody when it changes


class Round:
    """The life of one bridge.

    Attributes:
        spoiled: options of the engines to be built next; any thread appends, whoever builds takes.
        blocks: what holds a loop up; any thread appends, and all are set when the round ends.
    """

    def __init__(self, number: int, seed: int, plan: Plan, books: Books) -> None:
        self.plan = plan
        self.spoiled: deque[dict[str, Any]] = deque()
        self.blocks: deque[threading.Event] = deque()
        self._flaws = {
            name: share for name, share in FLAWS.items() if plan.flawed and (plan.deadly or name != "forgets")
        }
        self._name = f"{seed}/engine/{number}"
        self._engines: list[StormEngine] = []  # all that were built; whoever runs the factory appends, one at a time
        self.scene = Scene(number, plan, Bridge(self.build, **plan.options))
        self.judge = Judge(books, self.scene)
        if plan.start == "fails":
            self.spoiled.append({"start_error": ValueError("not loaded, by plan")})

    def build(self) -> StormEngine:
        """The bridge's factory."""
        options = {**self.plan.engine, **(self.spoiled.popleft() if self.spoiled else {})}
        error = options.pop("build_error", None)
        if error is not None:
            raise error
        engine = StormEngine(Random(f"{self._name}/{len(self._engines)}"), self._flaws, **options)
        self._engines.append(engine)
        return engine

    def engine(self) -> StormEngine | None:
        """The latest engine that has begun to start."""
        return next((engine for engine in reversed(self._engines) if engine.began), None)

    def close(self, drain: bool, timeout: float) -> None:
        """Close the bridge, perhaps beside others who do so."""
        scene = self.scene
        if drain and not self.plan.deadly:
            promised = frozenset(info.id for info in scene.bridge.requests())
            scene.promised = promised, time.monotonic() + timeout
        scene.closing = True
        scene.bridge.close(drain=drain, timeout=timeout)
        if scene.closed_at is None:
            scene.closed_at = time.monotonic()

    # --- what is left ---

    def look_at_quiet(self) -> None:
        """Nobody asks any more, and the bridge lives: nothing may be left in it."""
        bridge = self.scene.bridge
        for where, empty in (
            ("living", lambda: not bridge.requests()),
            ("at the gate", lambda: not _at_gate(bridge)),
            (
                "in an engine",
                lambda: not any(engine.active for engine in self._engines if not (engine.closed or engine.lost)),
            ),
        ):
            if not _soon(empty):
                self._leaked(f"requests {where} while nobody asks: {bridge.requests()}, {bridge.health()}")

    def look_at_end(self, calls_hang: bool) -> None:
        """The bridge was closed and everybody has left: nothing may be left of it, and all calls must be counted."""
        for block in self.blocks:
            block.set()
        self._look_at_futures()
        self._look_at_engines()
        bridge = self.scene.bridge
        if bridge.requests() or _at_gate(bridge):
            self._leaked(f"{len(bridge.requests())} requests, {_at_gate(bridge)} at the gate")
        if not calls_hang:
            self._look_at_counts()
        del bridge
        self._let_go(calls_hang)

    def _look_at_futures(self) -> None:
        for asked in self.scene.futures:
            asked.look()
        self._look_at_threads()
        for asked in self.scene.futures:
            asked.look_at_callback()

    def _look_at_threads(self) -> None:
        if not _soon(lambda: not _own_threads()):
            for name in _own_threads():
                self._leaked(f"the thread {name!r}")

    def _look_at_engines(self) -> None:
        for place, engine in enumerate(self._engines):
            if engine.began and not engine.closed and not engine.lost:
                self._leaked(f"engine {place} of {len(self._engines)} was not closed")
            elif engine.closes > 1:
                self._leaked(f"engine {place} of {len(self._engines)} was closed {engine.closes} times")
            elif engine.left and not self.plan.deadly:
                self._leaked(f"engine {place} was closed with {engine.left} requests in it")

    def _look_at_counts(self) -> None:
        metrics, (certain, possible) = self.scene.bridge.metrics, self.scene.made
        ended = sum(metrics.outcomes.values())
        started = getattr(metrics, "started", ended)
        wrong = abs(started - ended) + max(0, certain - ended) + max(0, ended - possible)
        if wrong:
            what = f"{certain} to {possible} calls were made, {started} started, {ended} ended"
            self.judge.fault("uncounted", f"{what}: {dict(metrics.outcomes)}", wrong)

    def _let_go(self, calls_hang: bool) -> None:
        scene = self.scene
        for box in (self.spoiled, self._engines, scene.futures, scene.streams, scene.clients):
            box.clear()
        bridge, scene.bridge = weakref.ref(scene.bridge), None
        if not calls_hang and not _soon(lambda: gc.collect() >= 0 and bridge() is None):  # another thread may collect
            holders = [type(holder).__name__ for holder in itertools.islice(gc.get_referrers(bridge()), 5)]
            self._leaked(f"the closed bridge itself, held by {holders}")

    def _leaked(self, what: str) -> None:
        self.judge.fault("leaked", what)


def _at_gate(bridge: Any) -> int:
    return int(bridge._server_thread.handle.gate.pending)


def _own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lmbridge")]


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes to hold before long."""
    end, pause = time.monotonic() + GRACE, threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        pause.wait(LOOK)
    return True
