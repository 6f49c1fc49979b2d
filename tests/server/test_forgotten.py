"""Requests that their engine forgets while it goes on with others, and those that only seem to be."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import lmbridge.server.sweep
from lmbridge import Bridge, EngineDeadError, EngineError, LMBridgeError, RequestAbortedError
from lmbridge.server.place import Place
from lmbridge.testing import ScriptedEngine

STALL = 0.3  # seconds; a step of these engines takes a few milliseconds


class Forgetful(ScriptedEngine):
    """An engine that forgets on cue, and says of its progress what ``tell`` makes of a request's id."""

    def __init__(self, tell: Callable[[str], int | None] = lambda request_id: None, max_batch_size: int = 8) -> None:
        super().__init__(step_time=0.002, max_batch_size=max_batch_size)
        self.tell = tell
        self.asked: Counter[str] = Counter()  # by request id
        self.told_to_abort: list[str] = []

    def progress(self, request_id: str) -> int | None:
        self.asked[request_id] += 1
        return self.tell(request_id)

    def abort_request(self, request_id: str) -> None:
        self.told_to_abort.append(request_id)
        super().abort_request(request_id)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that follow each other faster than twice a second."""
    monkeypatch.setattr(lmbridge.server.sweep, "INTERVAL", 0.02)


@contextmanager
def busy(bridge: Bridge) -> Iterator[None]:
    """Others have their requests answered all the while, each of them right."""
    stop, wrong = threading.Event(), list[str]()

    def ask() -> None:
        while not stop.is_set():
            try:
                text = bridge.infer("some other words", timeout=30).text
            except LMBridgeError as error:
                text = repr(error)
            if text != "some other words":
                wrong.append(text)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield
    finally:
        stop.set()
        asking.join(30)
    assert wrong == []


def place_of(bridge: Bridge) -> Place:
    run = bridge._server_thread.keeper.run
    assert run is not None
    place = run.loop.calls.place
    assert place is not None
    return place


def until_gone(bridge: Bridge, request_id: str) -> None:
    """Return when the server knows nothing of the request any more; the test's own timeout is the limit."""
    while any(info.id == request_id for info in bridge.requests()):
        bridge.stats()


def test_a_forgotten_request_fails_alone() -> None:
    """A caller whose request the engine has lost would wait for ever; it is told, and the others notice nothing."""
    engine, prompt = Forgetful(), "one two " + "many " * 1000
    with Bridge(engine, stall_timeout=STALL) as bridge, busy(bridge):
        stream = bridge.stream(prompt, request_id="lost")
        read = [next(stream).text]
        engine.forget(prompt)
        with pytest.raises(EngineError, match=r"no progress on this request for 0\.3 s.*Send it again") as caught:
            read.extend(delta.text for delta in stream)
        assert not isinstance(caught.value, EngineDeadError)
        assert (caught.value.retryable, caught.value.request_id) == (True, "lost")
        assert caught.value.partial == "".join(read)
        assert engine.told_to_abort == ["lost"]
        assert bridge.health().restarts == 0
        until_gone(bridge, "lost")
    assert bridge.metrics.outcomes["EngineError"] == 1


def test_places_of_forgotten_requests_are_used_again() -> None:
    """An engine that never lets go of what it has lost would serve fewer and fewer, and at last nobody."""
    engine = Forgetful(max_batch_size=2)
    with Bridge(engine, stall_timeout=STALL) as bridge, busy(bridge):
        for name in ("first", "second", "third", "fourth"):
            engine.forget(name)
            assert isinstance(bridge.submit(name, request_id=name).exception(30), EngineError)
            until_gone(bridge, name)
        assert len(place_of(bridge).calls) <= 1  # the one that is asked for all the while


def test_an_unanswered_abort_gives_the_place_back(caplog: pytest.LogCaptureFixture) -> None:
    """A caller that leaves a request which the engine has lost would leave a place occupied for ever."""
    engine = Forgetful(max_batch_size=2)
    engine.forget("lost")
    with Bridge(engine, stall_timeout=2.0) as bridge, busy(bridge), caplog.at_level(logging.WARNING, "lmbridge"):
        lost = bridge.submit("lost", request_id="left")
        engine.wait_for(lambda e: "left" in e.started and "left" not in e._active)
        bridge.abort("left")
        assert isinstance(lost.exception(30), RequestAbortedError)
        until_gone(bridge, "left")
        assert len(place_of(bridge).calls) <= 1
    assert "does not release request left" in caplog.text
    assert bridge.metrics.outcomes["RequestAbortedError"] == 1


def test_a_long_prompt_is_not_forgotten() -> None:
    """A request whose prompt takes longer than stall_timeout to read would fail, though the engine works on it."""
    numbers = itertools.count()
    engine = Forgetful(lambda request_id: next(numbers))
    engine.forget("a long prompt")  # no word of it, as while it is read
    with Bridge(engine, stall_timeout=STALL) as bridge, busy(bridge):
        reading = bridge.submit("a long prompt", request_id="reading")
        while engine.asked["reading"] < 60:  # 60 looks take four stall_timeouts
            bridge.stats()
        assert not reading.done()
        engine.tell = lambda request_id: 7  # it stands still from now on
        assert isinstance(reading.exception(30), EngineError)


def test_an_engine_that_only_reads_is_not_stalled() -> None:
    """An engine that reads one long prompt and has nothing else to do would be taken for dead."""
    numbers = itertools.count()
    engine = Forgetful(lambda request_id: next(numbers))
    engine.forget("a long prompt")
    with Bridge(engine, stall_timeout=STALL) as bridge:
        reading = bridge.submit("a long prompt", request_id="reading")
        while engine.asked["reading"] < 60:
            bridge.stats()
        assert (bridge.state, reading.done()) == ("ready", False)
        engine.tell = lambda request_id: 7
        assert isinstance(reading.exception(30), EngineDeadError)  # nobody else moved, so all of it stands


def test_an_engine_that_cannot_tell_its_progress(caplog: pytest.LogCaptureFixture) -> None:
    """A fault in progress() would end the server's sweep; the engine is judged by what it says instead."""

    def fail(request_id: str) -> int:
        raise SystemExit(request_id)

    engine = Forgetful(fail)
    engine.forget("lost")
    with Bridge(engine, stall_timeout=STALL) as bridge, busy(bridge):
        assert isinstance(bridge.submit("lost").exception(30), EngineError)
    assert caplog.text.count("failed to report its progress") == 1


@pytest.mark.parametrize("overlap", [True, False])
def test_an_engine_that_stalls_while_it_is_swapped_out(overlap: bool) -> None:
    """What an exchanged engine has begun would never end when it hangs, and a swap in place would wait for it."""
    old = ScriptedEngine(manual=True)
    engines = iter([old, ScriptedEngine(), ScriptedEngine()])
    with Bridge(lambda: next(engines), stall_timeout=STALL) as bridge:
        running = bridge.submit("never stepped")
        old.wait_for(lambda e: e.active == 1)
        bridge.swap(ScriptedEngine, overlap=overlap)
        assert isinstance(running.exception(30), EngineDeadError)
        assert bridge.infer("and on").text == "and on"
        old.wait_for(lambda e: e.closed)
