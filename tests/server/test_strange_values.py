"""Values of other people's code that are not what they should be: they cost one request at most, by name."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from lmbridge import (
    Bridge,
    Delta,
    Engine,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    Observer,
    Request,
    Response,
    Usage,
    WrongThreadError,
)
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.server.workshop import Workshop

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


class Says(Engine):
    """Says what it is told to; another prompt gets an honest answer."""

    def __init__(self, *deltas: Any) -> None:
        self._deltas = deltas

    async def start(self) -> None:
        pass

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        for delta in self._deltas if request.prompt == "strange" else (Delta("well", [1], finish_reason="stop"),):
            yield delta


@pytest.mark.parametrize(
    ("delta", "named"),
    [
        (Delta(None, [1]), "the text None"),  # type: ignore[arg-type]
        (Delta("a", (1,)), "the token_ids"),  # type: ignore[arg-type]
        (Delta("a", [1], logprobs=3), "the logprobs 3"),  # type: ignore[arg-type]
        (Delta(error="out of memory"), "the error 'out of memory'"),  # type: ignore[arg-type]
        (Delta(finish_reason="stop", usage=Usage(None, 1)), "the usage"),  # type: ignore[arg-type]
        (Delta(finish_reason="stop", usage=Usage(10**400, 1)), "the usage"),
        (Delta(finish_reason="stop", usage=Usage(1, -1)), "the usage"),
        (Delta(finish_reason=["stop"]), "the finish_reason"),  # type: ignore[arg-type]
        (Delta("a", reasoning=None), "the reasoning"),  # type: ignore[arg-type]
        (Delta("a", tool_calls=["paint"]), "the tool_calls"),  # type: ignore[list-item]
        (Delta("a", tool_calls=5), "the tool_calls"),  # type: ignore[arg-type]
        (Delta(error=OSError("no room")), "no room"),  # type: ignore[arg-type]
    ],
)
def test_what_an_engine_should_not_say(delta: Delta, named: str) -> None:
    """A text that is none would end the reader with a TypeError, and keep the threads of all futures busy for ever."""
    with Bridge(Says(Delta("so far", [1]), delta)) as bridge:
        for ask in (bridge.infer, lambda prompt: bridge.submit(prompt).result(30)):
            with pytest.raises(EngineError, match=named):
                ask("strange")
        assert bridge.submit("well").result(30).text == "well"
        assert bridge.metrics.outcomes == {"EngineError": 2, "stop": 1}


def test_one_error_said_of_two_requests() -> None:
    """An engine that keeps its error would tell one caller what another was told, and which request that was."""

    class Busy(Engine):
        busy = EngineError("the device is busy")

        async def start(self) -> None:
            self.go = asyncio.Event()

        async def generate(self, request: Request) -> AsyncIterator[Delta]:
            yield Delta(f"secret of {request.prompt}", [1])
            await self.go.wait()
            raise self.busy

    engine = Busy()
    with Bridge(engine) as bridge:
        futures = {name: bridge.submit(name, request_id=name) for name in ("ann", "bob")}
        until(lambda: [request.tokens for request in bridge.requests()] == [1, 1])
        bridge._server_thread.handle.run_soon(engine.go.set)
        for name, future in futures.items():
            error = future.exception(30)
            assert isinstance(error, EngineError)
            assert (error.request_id, error.partial) == (name, f"secret of {name}")


def test_an_error_given_to_two_streams(scripted: Scripted) -> None:
    """Each reader is told what became of his own answer."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    error = EngineError("over")
    streams = [bridge.stream("a b"), bridge.stream("c d")]
    engine.wait_for(lambda e: e.active == 2)
    engine.step()
    for stream in streams:
        next(stream)
        stream.close(error)
    ends = []
    for stream in streams:
        with pytest.raises(EngineError) as raised:
            next(stream)
        ends.append(raised.value.partial)
    assert ends == ["a", "c"]


def test_an_error_that_takes_no_attributes(scripted: Scripted) -> None:
    """Its caller would wait for ever."""

    @dataclasses.dataclass(frozen=True)
    class FrozenError(EngineError):
        code: int = 7

    bridge, engine = scripted()
    engine.refuse("strange", FrozenError())
    with pytest.raises(EngineError, match="code=7"):
        bridge.infer("strange", timeout=30)


class UnspeakableError(Exception):
    """Has neither a text nor a look."""

    def __str__(self) -> str:
        raise AttributeError("msg")

    __repr__ = __str__


def test_an_exception_that_cannot_be_shown(scripted: Scripted) -> None:
    """Whatever it ends, everybody is told with its type instead."""
    workshop = Workshop(manual=False, max_batch_size=4)
    bridge, _ = scripted(workshop)
    bridge.start()
    workshop.built[-1].refuse("strange", UnspeakableError())
    with pytest.raises(EngineError, match="UnspeakableError"):
        bridge.infer("strange", timeout=30)
    workshop.built[-1].stall()
    future = bridge.submit("begun")
    workshop.built[-1].wait_for(lambda e: e.active == 1)
    workshop.built[-1].crash(UnspeakableError())
    assert isinstance(future.exception(30), EngineDeadError)
    assert bridge.infer("next", timeout=30).text == "next"
    failing, _ = scripted(lambda: ScriptedEngine(start_error=UnspeakableError()))
    with pytest.raises(EngineStartError, match="UnspeakableError"):
        failing.infer("x", timeout=30)


class Broken(logging.Handler):
    """Fails with each line, as one whose disk is full."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("disk full")


@pytest.fixture
def broken_log() -> Iterator[None]:
    logger, handler = logging.getLogger("lmbridge"), Broken()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


def test_a_log_that_cannot_be_written(scripted: Scripted, broken_log: None) -> None:
    """A handler that raises must cost nobody an answer, a rebuild or the end of a wait."""
    workshop = Workshop(manual=False)
    bridge, _ = scripted(workshop)
    assert bridge.infer("x", timeout=30).text == "x"
    workshop.built[-1].crash(RuntimeError("boom"))
    assert bridge.infer("after", timeout=30).text == "after"
    failing, _ = scripted(lambda: ScriptedEngine(start_error=ValueError("no model")))
    with pytest.raises(EngineStartError, match="no model"):
        failing.infer("x", timeout=30)
    bridge.close()
    assert bridge.state == "closed"


def test_a_handler_that_asks_the_bridge_while_its_load_fails(scripted: Scripted) -> None:
    """It holds the handler's lock while it waits: whoever logged before he told would wait for it for ever."""
    gate = threading.Event()
    bridge, _ = scripted(lambda: ScriptedEngine(start_error=ValueError("no model"), start_gate=gate))
    told: list[BaseException | None] = []

    class Asks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "app":
                future = bridge.submit("explain", timeout=30)
                gate.set()
                told.append(future.exception())

    handler = Asks()
    logging.getLogger().addHandler(handler)
    try:
        logging.getLogger("app").warning("hello")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "no model" in str(told)


@pytest.mark.parametrize("size", [None, 0, "8"])
def test_a_batch_size_that_is_none(scripted: Scripted, size: Any) -> None:
    """Its callers would wait for room that never comes."""

    class Odd(ScriptedEngine):
        async def start(self) -> None:
            await super().start()
            self.max_batch_size = size

    bridge, _ = scripted(Odd)
    with pytest.raises(EngineStartError, match="max_batch_size"):
        bridge.infer("x", timeout=30)


def test_progress_that_is_no_number(scripted: Scripted) -> None:
    """The watch over all engines must not end with one that answers nonsense."""

    class Odd(ScriptedEngine):
        def progress(self, request_id: str) -> Any:
            return [1, 2]

    bridge, engine = scripted(Odd(manual=True), stall_timeout=0.6)
    future = bridge.submit("x")
    engine.wait_for(lambda e: e.active == 1)
    assert isinstance(future.exception(30), EngineDeadError)


def test_an_engine_that_serves_already(scripted: Scripted) -> None:
    """Swapped in once more it would be started twice, and closed while it serves."""
    bridge, engine = scripted()
    assert bridge.infer("one", timeout=30).text == "one"
    with pytest.raises(EngineStartError, match="build another"):
        bridge.swap(engine)
    assert bridge.infer("two", timeout=30).text == "two"
    assert not engine.closed


# --- what callers give ---


class Hostile(str):
    """A string that cannot stand in a book of the server's."""

    def __hash__(self) -> int:
        if threading.current_thread().name == "lmbridge server":
            raise RuntimeError("no hash here")
        return str.__hash__(self)

    def __len__(self) -> int:
        assert threading.current_thread().name != "lmbridge server"
        return str.__len__(self)


def test_strings_of_a_kind_of_their_own(scripted: Scripted) -> None:
    """Their methods must not run on the server thread, which all share."""
    bridge, _ = scripted()
    assert bridge.infer(Hostile("a prompt"), request_id=Hostile("an id"), client=Hostile("me"), timeout=30).text
    assert bridge.client(Hostile("me too")).infer("x", timeout=30).text == "x"


@pytest.mark.parametrize("wrong", ["5", float("nan"), -1, [1]])
def test_times_that_are_none(wrong: Any) -> None:
    """A wrong time must not get as far as a thread that serves everybody."""
    for stall_timeout in (wrong, 0):
        with pytest.raises(InvalidRequestError, match="stall_timeout"):
            Bridge(ScriptedEngine, stall_timeout=stall_timeout)
    with Bridge(ScriptedEngine) as bridge:
        for call in (
            lambda: bridge.swap(ScriptedEngine, overlap=False, timeout=wrong),
            lambda: bridge.start(timeout=wrong),
            lambda: bridge.close(drain=True, timeout=wrong),
        ):
            with pytest.raises(InvalidRequestError, match="timeout"):
                call()
        assert bridge.infer("x", timeout=30).text == "x"
        bridge.close(drain=True, timeout=None)
    assert bridge.state == "closed"


@pytest.mark.parametrize("wrong", [10**400, "high", 1.5])
def test_priorities_that_are_none(scripted: Scripted, wrong: Any) -> None:
    """One that no float can hold would keep everybody else waiting for ever."""
    bridge, _ = scripted()
    with pytest.raises(InvalidRequestError, match="priority"):
        bridge.infer("x", priority=wrong)


@pytest.mark.parametrize("wrong", [["a"], 7, ""])
def test_names_that_are_none(scripted: Scripted, wrong: Any) -> None:
    """They are keys of books that the server keeps."""
    bridge, _ = scripted()
    with pytest.raises(InvalidRequestError, match="name"):
        bridge.client(wrong)
    with pytest.raises(InvalidRequestError, match="observer"):
        bridge.client(observer=wrong)


class Busybody(Observer):
    """Works in the request's context when it hears of the end, and exits."""

    def __init__(self) -> None:
        self.begun_ids: list[str] = []
        self.ends: list[Any] = []
        self.release = threading.Event()

    def begun(self, request: Request) -> None:
        self.begun_ids.append(request.id)

    def ended(self, request: Request, outcome: Any) -> None:
        self.ends.append(outcome)
        request.context.run(self.release.wait, 30)
        raise SystemExit(3)


def test_an_observer_at_work_in_the_context_of_a_request(scripted: Scripted) -> None:
    """While it is, the engine has to be told of the abort: that must not cost everybody the engine."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    observer = Busybody()
    client = bridge.client(observer=observer)
    other, stream = bridge.submit("other"), client.stream("a b c")
    engine.wait_for(lambda e: e.active == 2)
    leaving = threading.Thread(target=stream.close)
    leaving.start()
    engine.wait_for(lambda e: e.active == 1)
    observer.release.set()
    leaving.join(30)
    engine.step()
    assert other.result(30).text == "other"


def test_an_observer_hears_of_each_call(scripted: Scripted) -> None:
    """Streams that are left, lists that fail, and all that a close ends: each that began has one end."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    observer = Busybody()
    observer.release.set()
    client = bridge.client(observer=observer)
    left = client.stream("left a stream")
    engine.wait_for(lambda e: e.active == 1)
    engine.step()
    next(left)
    del left
    with pytest.raises(TimeoutError):
        client.infer(["a list", "that fails", "as a whole"], timeout=0)
    until(lambda: len(observer.ends) == 4)
    held = [client.stream("held"), client.stream_many(["held", "too"]), client.submit("held")]
    assert len(observer.begun_ids) == 8
    bridge.close()
    until(lambda: len(observer.ends) == 8)
    assert sum(isinstance(end, Response) for end in observer.ends) == 1
    del held


def test_reading_on_the_server_thread(scripted: Scripted) -> None:
    """An engine that reads an answer there would wait for itself; it is told so, and the others go on."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    reads: list[Callable[[], object]] = [
        bridge.submit("f").result,
        bridge.stream("s").__next__,
        bridge.stream_many(["g"]).__next__,
    ]
    engine.wait_for(lambda e: e.active == 3)
    found: list[BaseException] = []

    def read() -> None:
        for ask in reads:
            try:
                ask()
            except WrongThreadError as error:
                found.append(error)

    bridge._server_thread.handle.run_soon(read)
    until(lambda: len(found) == 3)
    future = bridge.submit("other")
    engine.wait_for(lambda e: e.active >= 1)
    engine.step()
    assert future.result(30).text == "other"
