"""Any order of submitting, reading, leaving, cancelling, crashing, swapping and closing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

import lmbridge.server.supervisor
from lmbridge import (
    Bridge,
    BridgeClosedError,
    Delta,
    EngineDeadError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    ResponseFuture,
    Stream,
)
from lmbridge.testing import ScriptedEngine

ENDS = (CancelledError, EngineDeadError, RequestAbortedError, RequestTimeoutError, BridgeClosedError)


class BridgeMachine(RuleBasedStateMachine):
    """Drives one bridge; time passes only in steps of its engine."""

    futures: Bundle[tuple[ResponseFuture, str]] = Bundle("futures")
    streams: Bundle[tuple[Stream, str]] = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[ScriptedEngine] = []
        self.count = 0
        self.ended: dict[str, int] = {}  # how often each future's callback ran
        self.open: list[tuple[ResponseFuture, str]] = []

    def build(self) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(manual=True, max_batch_size=2))
        return self.engines[-1]

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(lmbridge.server.supervisor, "MAX_FAILURES", 10_000)
        self.patch.setattr(lmbridge.server.supervisor, "FIRST_BACKOFF", 0.0)
        self.bridge = Bridge(self.build, max_pending=3, when_full="reject", stall_timeout=None)
        self.bridge.start()

    def prompt(self, words: int) -> str:
        self.count += 1
        return " ".join([f"p{self.count}", *["word"] * words])

    def until_read(self) -> None:
        """Return when the server has read all that was sent, so that a rule has the same effect each time."""
        self.bridge.stats()

    @rule(words=st.integers(0, 4))
    def time_out(self, words: int) -> None:
        with pytest.raises((RequestTimeoutError, QueueFullError)):
            self.bridge.infer(self.prompt(words), timeout=0)
        self.until_read()

    @rule(target=futures, words=st.integers(0, 4), timeout=st.sampled_from([None, 60.0]))
    def submit(self, words: int, timeout: float | None) -> Any:
        text = self.prompt(words)
        try:
            future = self.bridge.submit(text, timeout=timeout)
        except QueueFullError:
            return multiple()
        self.until_read()
        self.ended[text] = 0
        future.add_done_callback(lambda done: self.count_end(text))
        self.open.append((future, text))
        return future, text

    def count_end(self, text: str) -> None:
        self.ended[text] += 1

    @rule(target=streams, words=st.integers(0, 4))
    def stream(self, words: int) -> Any:
        text = self.prompt(words)
        try:
            stream = self.bridge.stream(text)
        except QueueFullError:
            return multiple()
        self.until_read()
        return stream, text

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        self.engines[-1].step(steps)

    @rule(pair=futures)
    def cancel(self, pair: tuple[ResponseFuture, str]) -> None:
        future, _ = pair
        assert future.cancel() or future._call.outcome is not None
        self.until_read()

    @rule(pair=futures)
    def abort(self, pair: tuple[ResponseFuture, str]) -> None:
        self.bridge.abort(pair[0].request_id)
        self.until_read()

    @rule(
        pair=consumes(streams),
        leave=st.sampled_from(["close", "drop", "break", "read"]),
        count=st.integers(1, 3),
    )
    def end_stream(self, pair: tuple[Stream, str], leave: str, count: int) -> None:
        stream, text = pair
        del pair
        if leave == "close":
            stream.close()
            with suppress(*ENDS):  # it may have ended before
                assert text.startswith(stream.response.text)
        elif leave == "break":
            self.read_some(stream, text, count)
        elif leave == "read":
            self.read_to_the_end(stream, text)
        del stream
        gc.collect(0)
        self.until_read()

    def read_some(self, stream: Stream, text: str, count: int) -> None:
        heard = ""
        with suppress(*ENDS):
            for delta in self.stepping(stream):
                heard += delta.text
                count -= 1
                if not count:
                    break
        assert text.startswith(heard)

    def stepping(self, stream: Stream) -> Iterator[Delta]:
        """The stream's deltas, with a step of the engine whenever there is none to read."""
        deltas = iter(stream)
        while True:
            while not stream._call.deltas and stream._call.outcome is None:
                self.engines[-1].step()
            try:
                yield next(deltas)
            except StopIteration:
                return

    def read_to_the_end(self, stream: Stream, text: str) -> None:
        while stream._call.outcome is None:
            self.engines[-1].step()
        try:
            assert "".join(delta.text for delta in stream) == text
        except ENDS:
            assert stream._call.outcome is not None

    @rule()
    def crash(self) -> None:
        built = len(self.engines)
        self.engines[-1].crash(ValueError("crashed"))
        while len(self.engines) == built or self.bridge.state != "ready":
            self.bridge.stats()

    @rule(overlap=st.booleans())
    def swap(self, overlap: bool) -> None:
        old = self.engines[-1]
        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(self.bridge.swap, self.build, overlap=overlap)
            while old.active or not swapping.done():
                old.step()
        swapping.result()
        self.until_read()

    @rule()
    def close_and_build_anew(self) -> None:
        """Close with whatever is in flight: all of it ends at once, and nothing is left."""
        self.bridge.close()
        self.look_at_ends()
        self.bridge = Bridge(self.build, max_pending=3, when_full="reject", stall_timeout=None)
        self.bridge.start()

    @invariant()
    def each_ends_at_most_once(self) -> None:
        assert all(times <= 1 for times in self.ended.values())

    def teardown(self) -> None:
        if not hasattr(self, "bridge"):
            return
        while any(not future.done() for future, _ in self.open):
            self.engines[-1].step()
        self.bridge.close()
        self.look_at_ends()
        self.patch.undo()

    def look_at_ends(self) -> None:
        """After a close: every future has ended exactly once, with its own answer or an error, and nothing is left."""
        for future, text in self.open:
            if not future.cancelled():
                error = future.exception(10)
                assert isinstance(error, ENDS) if error is not None else future.result().text == text
        dispatcher = self.bridge._server_thread._dispatcher
        if dispatcher is not None:
            dispatcher._thread.join(10)  # the callbacks of the last ones have run
        assert self.bridge.requests() == []
        assert self.bridge._server_thread.gate.pending == 0
        assert all(engine.closed for engine in self.engines)
        assert all(times == 1 for times in self.ended.values())


TestBridgeMachine = BridgeMachine.TestCase
TestBridgeMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
