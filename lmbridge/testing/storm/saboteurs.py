"""What goes wrong while everybody asks: engines that die, stall and block, and swaps beside all that.

Rule: each act runs on a saboteur's thread and uses what a user has: the bridge's methods and the engine's cues.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from lmbridge.errors import BridgeClosedError, EngineDeadError, EngineStartError, LMBridgeError, RequestTimeoutError
from lmbridge.server.supervisor import MAX_FAILURES
from lmbridge.server.watchdog import LOOP_GRACE
from lmbridge.testing.storm.engine import StormEngine
from lmbridge.testing.storm.round import Round
from lmbridge.testing.storm.watch import Post, Watch

SWAP_PATIENCE = 40.0  # seconds a swap may take: a stall is noticed, a rebuild waits, a stuck thread is replaced
HOSTILE = (ValueError, MemoryError, SystemExit, asyncio.CancelledError, KeyboardInterrupt)
PAUSE = 5.0  # seconds at most between two acts


class Saboteur:
    """Commits acts, named like the methods below, one after another and at moments of its own."""

    def __init__(self, round: Round, watch: Watch, chance: Random, acts: list[str], name: str) -> None:
        self._round = round
        self._scene = round.scene
        self._watch = watch
        self._chance = chance
        self._acts = acts
        self._name = name
        self._thread = threading.Thread(target=self._run, name=f"storm {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        scene = self._scene
        self._post = self._watch.add(Post(self._watch, f"the {self._name}", lambda: scene.closed_at))
        act = ""
        try:
            for act in self._acts:
                scene.wait_for(self._chance.randrange(scene.plan.requests), PAUSE)
                if scene.over.is_set() or scene.closing:
                    return
                self._round.judge.books.act(act)
                getattr(self, act)()
        except BaseException as error:
            self._round.judge.fault("mixed", f"{act} raised {error!r}")
        finally:
            self._post.leave()

    # --- on the engine ---

    def _engine(self) -> StormEngine | None:
        return self._round.engine()

    def _cue(self, cue: Callable[[StormEngine], None]) -> None:
        """Give the present engine a cue, unless its loop has ended meanwhile."""
        engine = self._engine()
        if engine is not None:
            with suppress(RuntimeError, TimeoutError):
                cue(engine)

    def nothing(self) -> None:
        pass

    def is_asked_to_start(self) -> None:
        """Wait for the engine, beside those whose calls have it started."""
        timeout, scene = self._chance.choice((0.001, 10.0)), self._scene
        try:
            with self._post.waits("start()", time.monotonic() + timeout):
                scene.bridge.start(timeout)
        except LMBridgeError as error:
            lawful = scene.closing or scene.plan.deadly or isinstance(error, RequestTimeoutError)
            if not lawful:
                self._round.judge.fault("mixed", f"start() raised {error!r}")

    def crash(self) -> None:
        self._cue(lambda engine: engine.crash(ValueError("crashed by plan")))

    def stall(self) -> None:
        self._cue(lambda engine: engine.stall())

    def block(self) -> None:
        """Block the loop for a while, in which no engine is given up."""
        self._block(self._chance.uniform(0.05, 0.3), lost=False)

    def seize(self) -> None:
        """Block the loop until its thread is given up."""
        self._block(self._scene.plan.options["stall_timeout"] + LOOP_GRACE + 3.0, lost=True)

    def _block(self, seconds: float, lost: bool) -> None:
        engine, until = self._engine(), threading.Event()
        if engine is None:
            return
        engine.lost = engine.lost or lost
        self._round.blocks.append(until)
        with suppress(RuntimeError, TimeoutError):
            engine.block(until)
        self._scene.over.wait(seconds)
        until.set()

    def dies_adding(self) -> None:
        self._cue(lambda engine: setattr(engine, "dies_adding", True))

    def dies_aborting(self) -> None:
        self._cue(lambda engine: setattr(engine, "dies_aborting", True))

    def dies_in_line(self) -> None:
        """Die twice in a row: the new engine dies as it starts."""
        self._round.spoiled.append({"as_it_starts": lambda engine: engine.on_death(ValueError("died by plan"))})
        self.crash()

    def rebuild_fails_once(self) -> None:
        self._round.spoiled.append(self._spoilt())
        self.crash()

    def unbuildable(self) -> None:
        self._round.spoiled.extend(self._spoilt() for _ in range(20))
        self.crash()

    def dies_for_good(self) -> None:
        for _ in range(MAX_FAILURES):
            before = self._engine()
            self.crash()
            self._scene.wait_for(10**9, PAUSE, lambda before=before: self._engine() is not before)  # type: ignore[misc]

    def _spoilt(self) -> dict[str, Any]:
        """Options of an engine that cannot be loaded, in one of the ways in which libraries say so."""
        error = self._chance.choice(HOSTILE)
        where = self._chance.choice(["start_error", "start_error", "build_error"])
        return {where: error("not loaded, by plan"), "load_time": self._chance.choice((0.0, 0.1))}

    def _close_error(self) -> BaseException | None:
        """What an engine's close raises; usually nothing."""
        return self._chance.choice(HOSTILE)("by plan, as it closes") if self._chance.random() < 0.2 else None

    # --- swaps ---

    def _swap(self, overlap: bool, timeout: float | None = None, sound: bool = True, **options: Any) -> None:
        """Swap, and see that it ends as it may."""
        round, scene = self._round, self._scene
        usual = {"load_time": self._chance.choice((0.0, 0.05, 0.2)), "close_error": self._close_error()}
        round.spoiled.append({**usual, **options})
        try:
            with self._post.waits("a swap", time.monotonic() + SWAP_PATIENCE):
                scene.bridge.swap(round.build, overlap=overlap, timeout=timeout)
        except (EngineStartError, EngineDeadError, RequestTimeoutError, BridgeClosedError) as error:
            late = isinstance(error, RequestTimeoutError) and timeout is not None
            if sound and not late and not scene.plan.deadly and not scene.closing:
                round.judge.fault("mixed", f"a sound swap failed: {error!r}")
        except LMBridgeError as error:
            round.judge.fault("mixed", f"a swap ended with {error!r}")

    def swap_beside(self) -> None:
        self._swap(overlap=True)

    def swap_in_place(self) -> None:
        self._swap(overlap=False)

    def swap_in_time(self) -> None:
        """Swap in place with little time for what runs."""
        self._swap(overlap=False, timeout=self._chance.choice((0.0, 0.01, 0.5)))

    def swaps(self) -> None:
        for _ in range(5):
            self._swap(overlap=self._chance.random() < 0.6)

    def failing_swap_beside(self) -> None:
        self._swap(overlap=True, sound=False, **self._spoilt())

    def failing_swap_in_place(self) -> None:
        self._swap(overlap=False, sound=False, **self._spoilt())

    def swap_beside_a_stall(self) -> None:
        self.stall()
        self._swap(overlap=True)

    def swap_in_place_of_a_stall(self) -> None:
        self.stall()
        self._swap(overlap=False, timeout=self._chance.choice((None, 0.1)))

    def dies_during_a_swap(self) -> None:
        self._swap(overlap=True, as_it_starts=self._crash_old())

    def dies_during_a_failing_swap(self) -> None:
        spoilt = {**self._spoilt(), "as_it_starts": self._crash_old(), "load_time": 0.2}
        self._swap(overlap=self._chance.random() < 0.7, sound=False, **spoilt)

    def _crash_old(self) -> Callable[[StormEngine], None]:
        """What has the present engine die while the next one starts, on the loop."""
        old = self._engine()

        def crash(new: StormEngine) -> None:
            if old is not None:
                old.on_death(ValueError("crashed by plan, during a swap"))

        return crash
