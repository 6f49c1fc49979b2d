"""A session belongs to one turn at a time, from before it is sent until its answer was read or left."""

from __future__ import annotations

import dis
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import FrameType
from typing import Any

import pytest

from lmbridge import InvalidRequestError, RequestTimeoutError
from lmbridge.compat import lmdeploy
from lmbridge.compat.lmdeploy import Pipeline, Session, pipeline
from lmbridge.testing import ScriptedEngine

PATIENCE = 30.0
HERE = lmdeploy.__file__.removesuffix("__init__.py")


class Halting(dict[str, Any]):
    """A message that halts whoever looks into it, until ``go`` is set: a turn that is claimed and not yet sent."""

    def __init__(self, content: str) -> None:
        super().__init__(role="user", content=content)
        self.reached = threading.Event()
        self.go = threading.Event()

    def get(self, *args: Any) -> Any:
        self.reached.set()
        self.go.wait(PATIENCE)
        return super().get(*args)


# ---------------------------------------------------------------------------------------------------- one at a time


def test_two_turns_at_once() -> None:
    """Both accepted, each would miss the other in the history, and an answer could land under the wrong prompt."""
    message = Halting("first")
    with pipeline(ScriptedEngine()) as pipe, ThreadPoolExecutor(1) as pool:
        session = pipe.session()
        first = pool.submit(pipe.chat, [message], session)
        assert message.reached.wait(PATIENCE)
        with pytest.raises(InvalidRequestError, match="running"):
            pipe.chat("second", session)
        message.go.set()
        assert first.result(PATIENCE) is session
        assert session.prompt == [message]
        pipe.chat("third", session)
        assert [answered for _, answered in session.history] == ["first", "third"]


def test_a_session_twice_in_a_list() -> None:
    """Two answers in one name could not be told apart by abort(); refused, the call leaves its other sessions free."""
    engine = ScriptedEngine()
    with pipeline(engine) as pipe:
        one, two = pipe.session(), pipe.session()
        with pytest.raises(InvalidRequestError, match="running"):
            pipe.stream_infer(["a", "b", "c"], [one, two, one])
        assert engine.started == []
        assert len(list(pipe.stream_infer(["a", "b"], [one, two]))) == 4


def test_a_busy_session_is_refused_everywhere() -> None:
    """A second stream in its name would take the first one's place, and abort() would no longer reach the first."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe:
        busy, idle = pipe.session(), pipe.session()
        stream = pipe.stream_infer("a b", busy)
        engine.wait_for(lambda e: e.active == 1)
        for ask in (
            lambda: pipe.stream_infer("c", busy),
            lambda: pipe.stream_infer(["c", "d"], [idle, busy]),
            lambda: pipe.chat("c", busy),
        ):
            with pytest.raises(InvalidRequestError, match="running"):
                ask()
        busy.abort()
        assert [part.finish_reason for part in stream] == ["abort"]
        assert len(engine.started) == 1


@pytest.mark.parametrize("wrong", [True, "a session", [None, 7.5]])
def test_what_is_no_session(wrong: Any) -> None:
    """It is refused before anything is sent, rather than failing once the prompts run."""
    engine = ScriptedEngine()
    with pipeline(engine) as pipe:
        with pytest.raises(InvalidRequestError, match="session"):
            pipe.stream_infer(["a", "b"] if isinstance(wrong, list) else "a", wrong)
        with pytest.raises(InvalidRequestError, match="session"):
            pipe.chat("a", wrong)
        assert engine.started == []


# ------------------------------------------------------------------------------------------------ when it is free again


def test_the_last_part_gives_the_session_back() -> None:
    """A reader who has the last part and keeps the stream could not go on with the conversation; nothing is missed."""
    with pipeline(ScriptedEngine()) as pipe:
        session = pipe.session()
        stream = pipe.chat("a b", session, stream_response=True)
        while next(stream).finish_reason is None:
            assert session.history == []
        assert pipe.chat("c", session).history == [("a b", "a b"), ("c", "c")]
        held = pipe.stream_infer("d", session)
        assert next(held).text == "d"
        assert next(held).finish_reason == "stop"
        assert pipe.chat("e", session).response.text == "e"
        assert list(held) == []


@pytest.mark.parametrize("leave", ["close", "drop", "with", "break", "never read"])
def test_leaving_an_answer_gives_the_session_back(leave: str) -> None:
    """A session whose answer nobody reads would be refused for good."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe:
        session = pipe.session()
        stream = pipe.chat("a b c", session, stream_response=True)
        if leave != "never read":
            engine.wait_for(lambda e: e.active == 1)
            engine.step()
        if leave == "close":
            stream.close()
        elif leave == "with":
            with stream:
                next(stream)
        elif leave == "break":
            for _part in stream:
                break
            del stream
        else:
            del stream
        engine.wait_for(lambda e: e.active == 0)
        again = pipe.chat("again", session, stream_response=True)
        engine.wait_for(lambda e: e.active == 1)
        engine.step()
        assert [part.text for part in again] == ["again", ""]
        assert session.history == [("again", "again")]


def test_a_call_that_fails_gives_the_session_back() -> None:
    """What is refused or fails must not end the conversation, also while its error is kept."""
    engine = ScriptedEngine()
    with pipeline(engine) as pipe:
        session = pipe.session()
        errors = []
        calls: list[tuple[Any, dict[str, Any]]] = [
            ("a", {"gen_config": 7}),
            ("a", {"chat_template_kwargs": 7}),
            (7, {}),
        ]
        for prompt, more in calls:
            with pytest.raises(ValueError) as error:
                pipe.chat(prompt, session, **more)
            errors.append(error)
        assert engine.started == []
        engine.fail("poison", ValueError("it fell apart"))
        assert pipe.chat("poison", session).response.finish_reason == "error"
        assert pipe.chat("b", session).history == [("b", "b")]


def test_a_turn_whose_time_is_up_gives_the_session_back() -> None:
    """A question that took too long is no turn, and the next one starts at once, also while its error is kept."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe, ThreadPoolExecutor(1) as pool:
        session = pipe.session()
        with pytest.raises(RequestTimeoutError) as error:
            pipe.chat("a", session, timeout=0)
        engine.wait_for(lambda e: e.active == 0)
        turn = pool.submit(pipe.chat, "b", session)
        engine.wait_for(lambda e: e.active == 1)
        engine.step()
        assert turn.result(PATIENCE).history == [("b", "b")]
        assert error.value.retryable  # and is kept until here


# ------------------------------------------------------------------------------------------------------------- abort()


def test_abort_reaches_a_turn_that_is_not_sent_yet() -> None:
    """A user who presses stop a moment too early would wait for the whole answer."""
    message = Halting("a b c")
    with pipeline(ScriptedEngine(manual=True)) as pipe, ThreadPoolExecutor(1) as pool:
        session = pipe.session()
        turn = pool.submit(pipe.chat, [message], session)
        assert message.reached.wait(PATIENCE)
        session.abort()
        message.go.set()
        assert turn.result(PATIENCE).response.finish_reason == "abort"


def test_abort_reaches_a_turn_that_waits_for_room() -> None:
    """Where all places are taken, an abort that waited for one would come after everybody else's answers."""
    engine = ScriptedEngine(manual=True, max_batch_size=1)
    with pipeline(engine, max_pending=1) as pipe:
        others = [pipe.stream_infer("in the engine")]
        engine.wait_for(lambda e: e.active == 1)
        others.append(pipe.stream_infer("in the queue"))
        session = pipe.session()
        stream = pipe.stream_infer(["a", "b"], [session, None])
        session.abort()
        part = next(stream)
        assert (part.index, part.finish_reason) == (0, "abort")
        assert engine.active == 1


def test_a_session_closed_during_a_turn_has_forgotten_it() -> None:
    """close() forgets everything; the turn it ends would come back as the first of the next conversation."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe, ThreadPoolExecutor(1) as pool:
        session = pipe.session()
        turn = pool.submit(pipe.chat, "a b c", session)
        engine.wait_for(lambda e: e.active == 1)
        engine.step()
        session.close()
        turn.result(PATIENCE)
        assert (session.history, session.response) == ([], None)


def test_a_second_reader_leaves_the_first_alone() -> None:
    """A stream read by two threads by mistake: the second is told, and the first one's answer is not cut off."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe, ThreadPoolExecutor(2) as pool:
        stream = pipe.stream_infer("a b")
        engine.wait_for(lambda e: e.active == 1)
        readers = [pool.submit(next, stream) for _ in range(2)]
        [refused], [reader] = wait(readers, PATIENCE, FIRST_EXCEPTION)
        assert isinstance(refused.exception(), RuntimeError)
        engine.step(2)
        assert reader.result(PATIENCE).text.startswith("a")


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


class Striking:
    """Raises KeyboardInterrupt in the drop-in's code, at the place of that number among those where Python might.

    It looks for signals after calls, when a function begins, and when a loop goes round.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self._called: set[FrameType] = set()  # frames whose latest bytecode was a call

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        frame.f_trace_opcodes = True
        return self._look

    def _look(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "opcode":
            return self._look
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if frame in self._called or name == "RESUME" or "JUMP_BACKWARD" in name:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        self._called.discard(frame)
        if name.startswith("CALL"):
            self._called.add(frame)
        return self._look


def interruptions(call: Callable[[], Any], kept: list[BaseException] | None = None) -> Iterator[int]:
    """Strike ``call`` at one place after the other, and yield each time; ``kept`` gets what was raised."""
    for count in itertools.count():
        try:
            with Striking(count):
                call()
        except KeyboardInterrupt as error:
            if kept is not None:
                kept.append(error)
        else:
            return
        yield count


SENT: dict[str, Callable[[Pipeline, Session], Any]] = {
    "one": lambda pipe, session: pipe.stream_infer("a b c d", session),
    "several": lambda pipe, session: pipe.stream_infer(["a b c d", "e f g h"], [None, session]),
    "whole": lambda pipe, session: pipe.stream_infer(["a b c d", "e f g h"], [session, None], stream_response=False),
    "chat": lambda pipe, session: pipe.chat("a b c d", session, stream_response=True),
}


@pytest.mark.parametrize("sent", SENT)
def test_ctrl_c_while_sending(sent: str) -> None:
    """Wherever it strikes, nothing runs on with nobody to stop it, and the session is free for the next call."""
    engine = ScriptedEngine(manual=True)
    with pipeline(engine) as pipe:
        session = pipe.session()
        kept: list[BaseException] = []  # an interactive Python keeps the last one, with its frames and all they hold
        for count in interruptions(lambda: SENT[sent](pipe, session), kept):
            engine.step(2)  # whatever was sent has arrived
            engine.wait_for(lambda e: e.active == 0)
            assert count < 10_000
        engine.step(2)
        assert pipe.bridge.requests() == []
        with SENT[sent](pipe, session):
            engine.wait_for(lambda e: e.active > 0)


READ: dict[str, Callable[[Pipeline, Session], Any]] = {
    "several": lambda pipe, session: list(pipe.stream_infer(["a b", "c"], [session, None])),
    "chat": lambda pipe, session: pipe.chat("a b", session),
    "streamed chat": lambda pipe, session: list(pipe.chat("a b", session, stream_response=True)),
}


@pytest.mark.parametrize("read", READ)
def test_ctrl_c_while_reading(read: str) -> None:
    """Wherever it strikes, the turn is remembered whole or not at all, and the session is free for the next call."""
    with pipeline(ScriptedEngine()) as pipe:
        session = pipe.session()
        for count in interruptions(lambda: READ[read](pipe, session)):
            assert session.history in ([], [("a b", "a b")])
            session.reset()
            assert count < 10_000
        assert session.history == ([] if read == "several" else [("a b", "a b")])
