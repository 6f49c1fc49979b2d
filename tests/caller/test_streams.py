"""Answers read while they grow, and left before they end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge import Bridge, BridgeClosedError, Delta, EngineError, RequestTimeoutError, Stream
from lmbridge.testing import ScriptedEngine
from tests.conftest import until

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


def test_deltas_join_to_the_answer(scripted: Scripted) -> None:
    """What is printed delta by delta is the whole answer, and .response has it with usage and timings."""
    bridge, _ = scripted(ScriptedEngine(step_time=0.001))
    stream = bridge.stream("once upon a time")
    assert "".join(delta.text for delta in stream) == "once upon a time"
    assert stream.response.text == "once upon a time"
    assert stream.response.token_ids == [1, 2, 3, 4]
    assert stream.response.finish_reason == "stop"
    assert stream.response.usage.completion_tokens == 4


def test_a_reader_sees_each_step_as_it_comes(scripted: Scripted) -> None:
    """Streaming streams: each step's text can be read before the next step is made."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("one two three")
    engine.wait_for(lambda e: e.active == 1)
    seen = []
    for _ in range(3):
        engine.step()
        seen.append(next(stream).text)
    assert seen == ["one", " two", " three"]
    with pytest.raises(StopIteration):
        next(stream)


def test_a_slow_reader_gets_merged_deltas(scripted: Scripted) -> None:
    """A reader that is behind gets what it missed in one delta, in order, with nothing lost."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c d e f")
    engine.wait_for(lambda e: e.active == 1)
    engine.step(4)
    merged = next(stream)
    assert (merged.text, merged.token_ids) == ("a b c d", [1, 2, 3, 4])
    engine.step(2)
    assert "".join(delta.text for delta in stream) == " e f"


def _leave_by_break(stream: Stream) -> None:
    for _ in stream:
        break


def _leave_by_close(stream: Stream) -> None:
    next(stream)
    stream.close()


def _leave_by_with(stream: Stream) -> None:
    with stream:
        next(stream)


def _leave_by_error(stream: Stream) -> None:
    def read() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()


@pytest.mark.parametrize("leave", [_leave_by_break, _leave_by_close, _leave_by_with, _leave_by_error])
def test_leaving_a_stream_stops_the_engine(scripted: Scripted, leave: Callable[[Stream], None]) -> None:
    """Leaving, in every way, stops the generation, even while the stream object is still held."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c d e f")
    engine.wait_for(lambda e: e.active == 1)
    engine.step(2)
    leave(stream)
    engine.wait_for(lambda e: e.active == 0)
    assert engine.aborted == [stream.request_id]
    assert stream.response.finish_reason == "abort"
    assert stream.response.text == "a b"


def test_a_dropped_stream_stops_the_engine(scripted: Scripted) -> None:
    """A stream nobody holds any more does not go on generating."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c")
    engine.wait_for(lambda e: e.active == 1)
    del stream
    gc.collect()
    engine.wait_for(lambda e: e.active == 0)
    assert len(engine.aborted) == 1


TOKENS = 20_000
ASK: dict[str, Callable[[Bridge], object]] = {
    "stream": lambda bridge: bridge.stream("long", max_new_tokens=TOKENS),
    "stream_many": lambda bridge: bridge.stream_many(["long"], max_new_tokens=TOKENS),
    "submit": lambda bridge: bridge.submit("long", max_new_tokens=TOKENS),
    "infer": lambda bridge: bridge.infer("long", max_new_tokens=TOKENS),
}


@pytest.mark.parametrize("way", ASK)
def test_memory_goes_with_the_text_and_not_with_the_steps(scripted: Scripted, way: str) -> None:
    """A reader who never comes would keep an object of 176 bytes for each token."""
    gc.collect()
    before = living_deltas()
    bridge, engine = scripted(ScriptedEngine(lambda request: ["word "] * TOKENS, manual=True))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ASK[way], bridge)
        engine.wait_for(lambda e: e.active == 1)
        engine.step(TOKENS - 1)
        unfinished = living_deltas() - before
        engine.step()
        held = asked.result(60)
    assert unfinished < TOKENS / 40
    assert living_deltas() - before < TOKENS / 40
    del held


def test_memory_of_an_answer_that_is_read_token_by_token(scripted: Scripted) -> None:
    """Whoever prints a long answer as it grows would keep an object for each token, for as long as he holds it."""
    gc.collect()
    before = living_deltas()
    bridge, engine = scripted(ScriptedEngine(lambda request: ["word "] * 4000, manual=True))
    stream = bridge.stream("long", max_new_tokens=4000)
    engine.wait_for(lambda e: e.active == 1)
    for _ in range(4000):
        engine.step()
        assert next(stream).text == "word "
    assert living_deltas() - before < 4000 / 20
    assert next(stream, None) is None
    assert stream.response.text == "word " * 4000


def living_deltas() -> int:
    return sum(type(something) is Delta for something in gc.get_objects())


def test_closing_from_another_thread_ends_the_reader(scripted: Scripted) -> None:
    """A reader that waits for the next delta sees the end when somebody else closes its stream."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [delta.text for delta in stream])
        engine.wait_for(lambda e: e.active == 1)
        stream.close()
        assert reading.result(10) == []


def test_a_stream_is_iterated_once(scripted: Scripted) -> None:
    """Iterating again raises instead of silently giving nothing."""
    bridge, _ = scripted()
    stream = bridge.stream("hello")
    assert [delta.text for delta in stream] == ["hello"]
    with pytest.raises(RuntimeError, match="iterated only once"):
        iter(stream)


def test_two_readers_of_one_stream_are_refused(scripted: Scripted) -> None:
    """A second thread that reads the same stream is told so; the first goes on undisturbed."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b")
    engine.wait_for(lambda e: e.active == 1)
    entered = threading.Event()

    def read() -> str:
        entered.set()
        return "".join(delta.text for delta in stream)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        entered.wait(10)
        until(stream._turn.locked)
        with pytest.raises(RuntimeError, match="Another thread"):
            next(stream)
        engine.step(2)
        assert reading.result(10) == "a b"


def test_response_before_the_end_says_so(scripted: Scripted) -> None:
    """.response of an unfinished stream raises instead of giving half an answer."""
    bridge, _ = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b")
    with pytest.raises(RuntimeError, match="not ended"):
        stream.response  # noqa: B018


def test_deadline_of_a_stream(scripted: Scripted) -> None:
    """A stream's deadline raises in its reader with all text of the stream so far, and aborts on the engine."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    stream = bridge.stream("one two three", timeout=0.5)
    engine.wait_for(lambda e: e.active == 1)
    engine.step(1)
    assert next(stream).text == "one"
    engine.step(1)
    assert next(stream).text == " two"
    with pytest.raises(RequestTimeoutError) as caught:
        next(stream)
    assert caught.value.partial == "one two"
    engine.wait_for(lambda e: e.active == 0)


def test_deadline_of_a_stream_nobody_reads(scripted: Scripted) -> None:
    """A stream that is held but not read is aborted on the engine at its deadline all the same."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    bridge.start()
    stream = bridge.stream("one two three", timeout=0.2)
    engine.wait_for(lambda e: len(e.aborted) == 1)
    with pytest.raises(RequestTimeoutError):
        next(stream)


def test_failure_in_the_middle_of_a_stream(scripted: Scripted) -> None:
    """What came before the failure is still delivered, then the error is raised, never a silent end."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c")
    engine.wait_for(lambda e: e.active == 1)
    engine.step(2)
    engine.fail("a b c", ValueError("broken"))
    engine.step(1)
    assert next(stream).text == "a b"
    with pytest.raises(EngineError) as caught:
        next(stream)
    assert caught.value.partial == "a b"


def test_closing_the_bridge_ends_a_waiting_reader(scripted: Scripted) -> None:
    """A reader blocked in next() gets BridgeClosedError when the bridge is closed."""
    bridge, engine = scripted(ScriptedEngine(manual=True))
    stream = bridge.stream("a b c")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(next, stream)
        engine.wait_for(lambda e: e.active == 1)
        bridge.close()
        assert isinstance(reading.exception(10), BridgeClosedError)


def test_a_chat_forgets_the_turn_that_was_left(scripted: Scripted) -> None:
    """A conversation remembers whole answers only; an aborted turn leaves its history unchanged."""
    bridge, _ = scripted(ScriptedEngine())
    chat = bridge.chat(system="be short")
    assert chat.ask("hello there").text == "hello there"
    history = list(chat.messages)
    for _ in chat.stream("a very long question"):
        break
    assert chat.messages == history
    assert "".join(delta.text for delta in chat.stream("and now")) == "and now"
    assert [message["content"] for message in chat.messages[1:]] == ["hello there", "hello there", "and now", "and now"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be short"}]
