"""Any order of loading, failing to load, dying, stalling, getting stuck, swapping and closing, while callers ask."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

import lmbridge.server.keeper
import lmbridge.server.places
import lmbridge.server.supervisor
import lmbridge.server.watchdog
from lmbridge import Bridge, BridgeClosedError, EngineDeadError, EngineStartError, RequestTimeoutError
from lmbridge.testing import ScriptedEngine
from tests.bridge.asked import PATIENCE, TASK_WAYS, WAYS, in_thread
from tests.bridge.machine import Machine, lengths
from tests.conftest import until

STALL = 0.4  # seconds without progress after which an engine is taken for dead
GRACE = 0.3  # seconds that a stuck thread or an engine that closes may take besides
WHICH = st.integers(0, 3)

ERRORS: dict[str, BaseException] = {
    "fails": OSError("not loaded, as told"),
    "exits": SystemExit("not loaded, as told"),
    "is cancelled": asyncio.CancelledError("not loaded, as told"),
}


class LifeMachine(Machine):
    """Engines that answer by themselves, a word every other millisecond, and do not live long."""

    def __init__(self) -> None:
        super().__init__()
        self.load_error: BaseException | None = None  # what the next engines are loaded with
        self.build_error: BaseException | None = None  # raised instead of building one
        self.failures = 0  # how many times
        self.loading = threading.Event()  # engines are loaded once it is set
        self.loading.set()
        self.releases: list[threading.Event] = []  # of loops that are stuck
        self.swaps: list[tuple[Future[None], set[type[BaseException]]]] = []
        self.closing: Future[None] | None = None
        self.first = 0  # the bridge's first engine
        self.risks: set[type[BaseException]] = set()  # what calls and swaps of this bridge may end with

    def build(self) -> ScriptedEngine:
        error: BaseException | None = None
        if self.failures:
            self.failures -= 1
            if self.build_error is not None:
                raise self.build_error
            error = self.load_error
        self.engines.append(
            ScriptedEngine(step_time=0.002, max_batch_size=4, start_error=error, start_gate=self.loading)
        )
        return self.engines[-1]

    @initialize(stall_timeout=st.sampled_from([None, STALL]), deaths=st.sampled_from([3, 10_000]))
    def begin(self, stall_timeout: float | None, deaths: int) -> None:
        self.patch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", deaths)
        self.patch.setattr(lmbridge.server.places, "CLOSE_GRACE", GRACE)
        self.patch.setattr(lmbridge.server.keeper, "MARGIN", GRACE)
        self.patch.setattr(lmbridge.server.watchdog, "LOOP_GRACE", GRACE)
        self.stall_timeout = stall_timeout
        self.open_bridge()

    def open_bridge(self) -> None:
        self.first = len(self.engines)
        self.closing = None
        self.age = 0
        self.risks = set() if self.stall_timeout is None else {EngineDeadError}  # on a busy machine any may seem dead
        self.bridge = Bridge(self.build, max_pending=8, stall_timeout=self.stall_timeout)

    def risk(self, *errors: type[BaseException]) -> None:
        """From now on calls and swaps of this bridge may end with these."""
        self.risks.update(errors)
        for error in errors:
            self.may_end_with(error)
        for _, may in self.swaps:
            may.update(errors)

    # --- asking ---

    @rule(
        way=st.sampled_from([*WAYS, *TASK_WAYS]),
        words=st.sampled_from([0, 3, 60]),
        timeout=st.sampled_from([None, None, 60.0, 0.02]),
        times=st.sampled_from([1, 6]),
    )
    def asks(self, way: str, words: int, timeout: float | None, times: int) -> None:
        for _ in range(times):
            self.ask(way, self.bridge, words, timeout, self.risks).hurry()

    # --- loading ---

    @rule(how=st.sampled_from(list(ERRORS)), where=st.sampled_from(["build", "start"]), times=st.sampled_from([1, 9]))
    def loads_fail(self, how: str, where: str, times: int) -> None:
        """The next load, or all to come."""
        self.failures = times
        self.load_error, self.build_error = (None, ERRORS[how]) if where == "build" else (ERRORS[how], None)
        self.risk(EngineStartError, EngineDeadError)

    @rule()
    def loads_work_again(self) -> None:
        self.failures = 0

    @rule()
    def loading_takes_long(self) -> None:
        self.loading.clear()

    @rule()
    def loading_is_through(self) -> None:
        self.loading.set()

    # --- what befalls an engine ---

    def living_engine(self, which: int) -> ScriptedEngine | None:
        """The newest, or one before it that has not been closed."""
        living = [engine for engine in self.engines[self.first :] if engine.threads and not engine.closed]
        return living[-1 - which % len(living)] if living and self.closing is None else None

    @rule(which=WHICH)
    def dies(self, which: int) -> None:
        engine = self.living_engine(which)
        if engine is not None:
            self.risk(EngineDeadError)
            engine.crash(ValueError("as told"))

    @precondition(lambda self: self.stall_timeout is not None)
    @rule(which=WHICH)
    def stalls(self, which: int) -> None:
        """For good."""
        engine = self.living_engine(which)
        if engine is not None:
            engine.stall()

    @precondition(lambda self: self.stall_timeout is not None)
    @rule(which=WHICH)
    def blocks_the_loop(self, which: int) -> None:
        """Until everything else is over."""
        engine = self.living_engine(which)
        if engine is not None:
            self.risk(EngineStartError)  # for swaps under way
            self.releases.append(threading.Event())
            engine.block(self.releases[-1])

    # --- swapping ---

    @precondition(lambda self: self.closing is None)
    @rule(overlap=st.booleans(), timeout=st.sampled_from([None, 0.05]))
    def swaps_engines(self, overlap: bool, timeout: float | None) -> None:
        bridge = self.bridge
        may = self.risks | ({RequestTimeoutError} if timeout is not None and not overlap else set())
        self.swaps.append((in_thread(lambda: bridge.swap(self.build, overlap=overlap, timeout=timeout)), may))

    # --- ending ---

    @precondition(lambda self: self.closing is None and self.age >= 10)
    @rule(drain=st.booleans(), timeout=st.sampled_from([0.05, 30.0]))
    def closes(self, drain: bool, timeout: float) -> None:
        bridge = self.bridge
        patient = drain and timeout > 1 and not self.swaps and not self.risks and not self.releases
        self.risks.add(BridgeClosedError)
        if not patient:  # otherwise what was asked before has to be answered
            self.risk(BridgeClosedError)
        self.closing = in_thread(lambda: bridge.close(drain=drain, timeout=timeout))

    @precondition(lambda self: self.closing is not None)
    @rule()
    def opens_anew(self) -> None:
        self.come_to_an_end()
        self.look_at_the_end()
        self.open_bridge()

    def come_to_an_end(self) -> None:
        """Everybody's end comes while loops are stuck and engines stalled; these are let go after that only."""
        self.failures = 0
        self.loading.set()
        until(lambda: all(asked.end.done() for asked in self.open), PATIENCE)
        until(lambda: all(swap.done() for swap, _ in self.swaps), PATIENCE)
        for swap, may in self.swaps:
            if self.releases:  # the loop was stuck: on a busy machine it is replaced too late for a swap
                may.add(RequestTimeoutError)
            error = swap.exception()
            assert error is None or isinstance(error, tuple(may)), f"a swap ended with {error!r}"
        self.swaps.clear()
        if self.closing is None:
            self._see_that_it_serves()
            self.bridge.close()
        else:
            self.closing.result(PATIENCE)
        for release in self.releases:
            release.set()
        self.releases.clear()

    def _see_that_it_serves(self) -> None:
        self.bridge.start() if self.bridge.state == "new" else None
        until(lambda: self.bridge.state in ("ready", "failed"), PATIENCE)
        if self.bridge.state == "ready" and self.stall_timeout is None:
            assert self.bridge.infer("and on it goes", timeout=PATIENCE).text == "and on it goes"


@pytest.mark.parametrize("length", lengths(25, 40))
def test_a_life_in_any_order(length: settings) -> None:
    """Whatever happens to engines and whenever they are exchanged or closed, nobody waits for what cannot come."""
    run_state_machine_as_test(LifeMachine, settings=length)
