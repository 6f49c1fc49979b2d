"""What the base class does for an author who writes ``generate`` only, and the worker thread it lends to engines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from lmbridge import Bridge, Delta, Engine, EngineError, GenerationConfig, Request
from lmbridge.engines import base, thread
from lmbridge.engines.thread import EngineThread

Generate = Callable[[Request], AsyncIterator[Delta]]
SAID = Delta("a word", [1])
STOP = Delta(finish_reason="stop")


class Written(Engine):
    """An engine whose ``generate`` is given."""

    name = "written"

    def __init__(self, generate: Generate) -> None:
        self._generate = generate

    async def start(self) -> None:
        pass

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        return self._generate(request)


class Heard:
    """What the sink of one request was told."""

    def __init__(self, engine: Engine, request_id: str = "one", then: Callable[[Delta], None] | None = None) -> None:
        self.deltas: list[Delta] = []
        self._then = then
        self._first = asyncio.Event()
        self._ended = asyncio.Event()
        context = contextvars.copy_context()
        config = GenerationConfig()
        engine.add_request(
            Request(request_id, "prompt", config, False, "test", 0, None, time.monotonic(), context), self._sink
        )

    def _sink(self, delta: Delta) -> None:
        assert not self._ended.is_set(), "a delta after the last one"
        self.deltas.append(delta)
        self._first.set()
        if delta.finish_reason is not None or delta.error is not None:
            self._ended.set()
        if self._then is not None:
            self._then(delta)

    async def first(self) -> None:
        await asyncio.wait_for(self._first.wait(), 10)

    async def end(self) -> Delta:
        """The last delta."""
        await asyncio.wait_for(self._ended.wait(), 10)
        return self.deltas[-1]


async def forever() -> None:
    await asyncio.Event().wait()


# ------------------------------------------------------------------------------------------------------------- the end


def test_an_id_used_again_can_be_aborted() -> None:
    """A caller who uses an id again as soon as the first answer is there could not stop the second one."""

    async def main() -> None:
        begun = asyncio.Event()

        async def generate(request: Request) -> AsyncIterator[Delta]:
            if later:
                begun.set()
                await forever()
            yield STOP

        engine = Written(generate)
        later: list[Heard] = []
        Heard(engine, then=lambda delta: later.append(Heard(engine)))
        await asyncio.wait_for(begun.wait(), 10)
        engine.abort_request("one")
        assert (await later[0].end()).finish_reason == "abort"

    asyncio.run(main())


def test_an_abort_before_the_first_step_is_answered() -> None:
    """A request aborted as soon as it was handed over would keep its place in the batch, and its id."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            yield STOP

        engine = Written(generate)
        heard = Heard(engine)
        engine.abort_request("one")
        assert await heard.end() == Delta(finish_reason="abort")
        assert engine.stats()["in_flight"] == 0

    asyncio.run(main())


def test_an_iterator_that_swallows_the_abort_ends_at_its_next_word() -> None:
    """An author's ``except:`` around a step would make requests unstoppable."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            yield SAID
            try:
                await forever()
            except BaseException:
                yield SAID
            yield STOP

        engine = Written(generate)
        heard = Heard(engine)
        await heard.first()
        engine.abort_request("one")
        assert (await heard.end()).finish_reason == "abort"
        assert len(heard.deltas) == 2

    asyncio.run(main())


def test_an_iterator_may_end_itself_when_it_is_aborted() -> None:
    """``except CancelledError: return`` is an abort like any other, not an answer without an end."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            try:
                yield SAID
                await forever()
            except asyncio.CancelledError:
                return

        engine = Written(generate)
        heard = Heard(engine)
        await heard.first()
        engine.abort_request("one")
        assert await heard.end() == Delta(finish_reason="abort")

    asyncio.run(main())


def test_a_cancellation_that_nobody_asked_for_is_a_failure() -> None:
    """A task of the author's library that is cancelled would end an answer half-way as if its caller had left."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            yield SAID
            raise asyncio.CancelledError

        last = await Heard(Written(generate)).end()
        assert isinstance(last.error, EngineError)
        assert isinstance(last.error.__cause__, asyncio.CancelledError)

    asyncio.run(main())


def test_a_failure_to_clean_up_does_not_spoil_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    """A connection that cannot be closed after the last word would fail an answer that is complete."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            try:
                yield STOP
            finally:
                raise OSError("not connected")

        assert await Heard(Written(generate)).end() == STOP

    asyncio.run(main())
    assert "request one failed to clean up: OSError('not connected')" in caplog.text


@pytest.mark.parametrize("aborted", [False, True])
def test_a_clean_up_without_end_holds_no_answer(monkeypatch: pytest.MonkeyPatch, aborted: bool) -> None:
    """A library that never finishes closing would keep the caller waiting, or the place in the batch taken."""
    monkeypatch.setattr(base, "CLEANUP_PATIENCE", 0.01)

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            try:
                yield SAID
                if aborted:
                    await forever()
                yield STOP
            finally:
                await forever()

        engine = Written(generate)
        heard = Heard(engine)
        if aborted:
            await heard.first()
            engine.abort_request("one")
        assert (await heard.end()).finish_reason == ("abort" if aborted else "stop")

    asyncio.run(main())


def test_an_iterator_need_not_be_a_generator() -> None:
    """``generate`` may return any async iterator; one without aclose() would fail every answer."""

    class Words:
        def __init__(self) -> None:
            self._deltas = [STOP, SAID]

        def __aiter__(self) -> Words:
            return self

        async def __anext__(self) -> Delta:
            return self._deltas.pop()

    async def main() -> None:
        heard = Heard(Written(lambda request: Words()))
        assert await heard.end() == STOP
        assert heard.deltas == [SAID, STOP]

    asyncio.run(main())


def test_a_sink_that_fails_does_not_take_the_loop_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """One request whose end cannot be told would end the server thread, and with it every other request."""

    async def main() -> None:
        async def generate(request: Request) -> AsyncIterator[Delta]:
            yield STOP

        def leave(delta: Delta) -> None:
            raise SystemExit

        engine = Written(generate)
        await Heard(engine, then=leave).end()
        assert await Heard(engine).end() == STOP

    asyncio.run(main())
    assert "The end of request one could not be delivered." in caplog.text


def test_an_iterator_that_refuses_to_end_does_not_hold_the_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``bridge.close()`` would leave a thread behind that waits for somebody's ``except CancelledError: pass``."""
    monkeypatch.setattr(base, "CLOSE_PATIENCE", 0.01)
    caplog.set_level(logging.WARNING)

    async def generate(request: Request) -> AsyncIterator[Delta]:
        yield SAID
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()

    bridge = Bridge(Written(generate))
    stream = bridge.stream("prompt", request_id="stubborn")
    next(stream)
    [server] = [thread for thread in threading.enumerate() if thread.name == "lmbridge server"]
    bridge.close(timeout=0)
    assert not server.is_alive()
    assert "does not end request stubborn" in caplog.text


# --------------------------------------------------------------------------------------------------- the worker thread

killed = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineThread]:
    monkeypatch.setattr(thread, "LOOK_INTERVAL", 0.01)
    worker = EngineThread("lmbridge test")
    yield worker
    worker.close()


def test_whatever_a_call_raises_is_told(worker: EngineThread) -> None:
    """A StopIteration out of a library's loading code would be lost, and the load would never end."""

    def run_dry() -> None:
        next(iter(()))

    def leave() -> None:
        sys.exit(3)

    def fail() -> None:
        raise ValueError("wrong")

    async def main() -> None:
        for call, cause in ((run_dry, StopIteration), (leave, SystemExit)):
            with pytest.raises(RuntimeError) as caught:
                await asyncio.wait_for(worker.run(call), 10)
            assert isinstance(caught.value.__cause__, cause)
        with pytest.raises(ValueError, match="wrong"):
            await worker.run(fail)
        assert await worker.run(divmod, 7, 3) == (2, 1)

    asyncio.run(main())


def test_a_thread_that_cannot_be_started_is_told(worker: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no threads left, a load would fail once and then wait for ever."""
    real = threading.Thread.start
    refused: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            await worker.run(int)
        assert await asyncio.wait_for(worker.run(int), 10) == 0

    asyncio.run(main())


@killed
def test_a_thread_that_ended_is_replaced(worker: EngineThread) -> None:
    """An exception thrown into the thread while it waits would let every later call of the engine wait for ever."""

    async def main() -> None:
        first = await worker.run(threading.current_thread)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(first.ident or 0), ctypes.py_object(SystemExit))
        calls = [worker.run(threading.current_thread) for _ in range(3)]
        threads = await asyncio.wait_for(asyncio.gather(*calls), 10)
        assert len(set(threads)) == 1
        assert threads[0] is not first

    asyncio.run(main())


@killed
@pytest.mark.parametrize("lost", [True, False])
def test_a_call_in_which_the_thread_ends_is_told(worker: EngineThread, lost: bool) -> None:
    """The call that a killed thread was at would be awaited for ever, and so would those behind it."""

    def strike(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            raise SystemExit
        return strike

    def call() -> str:
        above = sys._getframe(1)  # of the worker itself, which guards against all that a call raises
        above.f_trace = strike
        sys.settrace(lambda *event: None)
        if lost:
            raise SystemExit
        return "done"

    async def main() -> None:
        struck = asyncio.ensure_future(worker.run(call))
        behind = asyncio.ensure_future(worker.run(str, 7))
        if lost:
            with pytest.raises(RuntimeError, match="in the middle of a call"):
                await asyncio.wait_for(struck, 10)
        else:  # it had an outcome, of which nobody could be told
            assert await asyncio.wait_for(struck, 10) == "done"
        assert await asyncio.wait_for(behind, 10) == "7"

    asyncio.run(main())


def test_a_closed_thread_finishes_what_it_has_and_takes_no_more(worker: EngineThread) -> None:
    """A call after the close would wait for ever; one before it, an unload say, must not be lost."""
    gate = threading.Event()

    async def main() -> None:
        begun = asyncio.ensure_future(worker.run(gate.wait, 10))
        behind = asyncio.ensure_future(worker.run(threading.current_thread))
        await asyncio.sleep(0)  # both are in
        worker.close()
        gate.set()
        assert await begun
        thread = await asyncio.wait_for(behind, 10)
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(RuntimeError, match="is closed"):
            await asyncio.wait_for(worker.run(int), 10)

    asyncio.run(main())


def test_work_that_nobody_waits_for_is_not_begun() -> None:
    """Calls that were given up must not hold up those that come after them."""

    async def main() -> None:
        thread, release = EngineThread("lmbridge worker"), threading.Event()
        begun: list[object] = []
        first = asyncio.ensure_future(thread.run(release.wait, 30))
        calls = [thread.run(begun.append, number, while_awaited=number != 3) for number in range(5)]
        left = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        for work in left:
            work.cancel()
        await asyncio.wait(left)
        last = asyncio.ensure_future(thread.run(begun.append, "last"))
        release.set()
        await asyncio.wait_for(asyncio.gather(first, last), 30)
        assert begun == [3, "last"]  # the freeing of a model, say, has to be done in any case
        thread.close()

    asyncio.run(main())
