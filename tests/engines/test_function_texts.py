"""Functions that answer prompts: in one line they get turns, streams, aborts, and errors of a request's own."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmbridge import (
    Bridge,
    Delta,
    Engine,
    EngineError,
    GenerationConfig,
    InvalidRequestError,
    ModelNotFoundError,
    RequestTimeoutError,
    UnsupportedOptionError,
    UnsupportedTaskError,
    Usage,
    function_engine,
)
from lmbridge.testing import EngineContract, prompt_text
from tests.conftest import until

PROMPTS = [f"prompt number {number} of several" for number in range(6)]


async def words(prompt: str, config: GenerationConfig) -> AsyncIterator[str | Delta]:
    said = prompt.split()
    for word in said[: config.max_new_tokens]:
        yield f"{word} "
        await asyncio.sleep(0.001)
    if len(said) > config.max_new_tokens:
        yield Delta(finish_reason="length")


def plain_words(prompt: str) -> Iterator[str]:
    for word in prompt_text(prompt).split():
        yield f"{word} "
        time.sleep(0.001)  # as a call into a library takes its time


class TestAsyncGenerator(EngineContract):
    """A function that yields keeps the contract of engines."""

    prompts = PROMPTS
    long_prompt = "word " * 300
    stall_timeout = 0.4

    def engine(self) -> Engine:
        return function_engine(words, max_batch_size=4, supports={"max_new_tokens"})()


class TestPlainGenerator(EngineContract):
    """So does a plain one, on threads of its own."""

    prompts = PROMPTS
    long_prompt = "word " * 300
    stall_timeout = 0.4

    def engine(self) -> Engine:
        return function_engine(plain_words, max_batch_size=4)()


async def coroutine(prompt: str) -> str:
    return prompt.upper()


class Caller:
    def __call__(self, prompt: str) -> str:
        return prompt.upper()


@pytest.mark.parametrize("function", [coroutine, str.upper, lambda prompt: prompt.upper(), Caller()])
def test_whole_answers(function: Any) -> None:
    """A function that returns its answer at once serves prompts too, if it is said to."""
    with Bridge(function_engine(function, task="generate")) as bridge:
        assert bridge.tasks() == {"generate"}
        assert bridge.infer("hello", timeout=30).text == "HELLO"
        with pytest.raises(UnsupportedTaskError):
            bridge.call("hello")


def test_a_conversation_and_a_delta_cross_as_they_are() -> None:
    """The function gets the messages that were asked, and what it says of usage and its end reaches the caller."""
    asked: list[Any] = []

    async def answer(prompt: Any) -> AsyncIterator[Delta]:
        asked.append(prompt)
        yield Delta("yes", [5])
        yield Delta(finish_reason="length", usage=Usage(7, 1))

    messages = [{"role": "user", "content": "hello"}]
    with Bridge(function_engine(answer)) as bridge:
        response = bridge.infer(messages, timeout=30)
    assert asked == [messages]
    assert (response.text, response.token_ids, response.finish_reason) == ("yes", [5], "length")
    assert response.usage == Usage(7, 1)


def test_a_field_that_is_not_kept_is_refused() -> None:
    """What the function was not said to keep is an error by name, rather than dropped."""
    with Bridge(function_engine(words, supports={"max_new_tokens"})) as bridge:
        assert bridge.infer("one two three", max_new_tokens=2, timeout=30).text == "one two "
        with pytest.raises(UnsupportedOptionError, match="temperature"):
            bridge.infer("one", temperature=0.5)


def test_leaving_a_stream_ends_the_generator() -> None:
    """An answer that nobody reads on is closed, plain or not, so that what it holds is free."""
    closed = threading.Semaphore(0)

    def plain(prompt: str) -> Iterator[str]:
        try:
            while True:
                time.sleep(0.001)
                yield "word "
        finally:
            closed.release()

    async def looped(prompt: str) -> AsyncIterator[str]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield "word "
        finally:
            closed.release()

    for function in (plain, looped):
        with Bridge(function_engine(function)) as bridge:
            for _ in bridge.stream("go", timeout=30):
                break
            assert closed.acquire(timeout=30)
            until(_idle(bridge))


def _idle(bridge: Bridge) -> Callable[[], bool]:
    return lambda: not bridge.requests()


@pytest.mark.parametrize("result", [None, 5, [1, 2], [None]])
def test_what_is_no_text_is_named(result: Any) -> None:
    """A function that gives something else is told so in its caller's error, and the next call is served."""
    with Bridge(function_engine(lambda prompt: result if prompt == "bad" else "fine", task="generate")) as bridge:
        with pytest.raises(EngineError, match="instead of a string"):
            bridge.infer("bad", timeout=30)
        assert bridge.infer("good", timeout=30).text == "fine"


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and configurations name a function, in the folder that they are called in as well."""
    (tmp_path / "an_app_of_mine.py").write_text("def shout(prompt):\n    yield prompt.upper()\n\nfive = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with Bridge("an_app_of_mine:shout", engine="function") as bridge:
        assert bridge.infer("hello", timeout=30).text == "HELLO"
    with pytest.raises(ModelNotFoundError, match="an_app_of_mine:whisper"):
        Bridge("an_app_of_mine:whisper", engine="function")
    with pytest.raises(ModelNotFoundError, match="module:name"):
        Bridge("no_app_of_mine:whisper", engine="function")
    with pytest.raises(InvalidRequestError, match="is not callable"):
        Bridge("an_app_of_mine:five", engine="function")
    with pytest.raises(InvalidRequestError, match="module:name"):
        Bridge("an_app_of_mine", engine="function")


def test_a_function_that_cannot_be_interrupted_gets_no_more_threads_than_it_was_given() -> None:
    """Callers that leave a function while it blocks do not pile threads up; the next is answered once one is free."""
    go, began = threading.Event(), threading.Semaphore(0)

    def blocking(prompt: str) -> Iterator[str]:
        if prompt == "block":
            began.release()
            go.wait(30)
        yield prompt

    with Bridge(function_engine(blocking, max_batch_size=2)) as bridge:
        before = threading.active_count()
        for _ in range(4):
            with pytest.raises(RequestTimeoutError):
                bridge.infer("block", timeout=0.05)
        assert began.acquire(timeout=30)
        assert began.acquire(timeout=30)
        assert not began.acquire(blocking=False)
        assert threading.active_count() - before <= 2
        waiting = bridge.submit("go on")
        go.set()
        assert waiting.result(30).text == "go on"


def test_a_slow_close_holds_its_own_thread_only() -> None:
    """A stranger's prompt is not given to a thread that is still busy with what was left."""
    closing, go = threading.Event(), threading.Event()

    class Slow:
        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            return "word "

        def close(self) -> None:
            closing.set()
            go.wait(30)

    with Bridge(function_engine(lambda prompt: Slow() if prompt == "slow" else "fine", task="generate")) as bridge:
        next(stream := bridge.stream("slow", timeout=30))
        stream.close()
        assert closing.wait(30)
        assert [bridge.infer("other", timeout=10).text for _ in range(3)] == ["fine"] * 3
        go.set()


def test_supports_needs_a_config() -> None:
    """A function that is told nothing of a field cannot keep it, which is said where it is given."""
    with pytest.raises(InvalidRequestError, match="parameter named config"):
        function_engine(plain_words, supports={"temperature"})
    assert function_engine(words, supports="top_k, temperature")().supports == {"top_k", "temperature"}


def test_what_function_engine_has_made_is_no_function() -> None:
    """Naming it where a function belongs is explained, rather than taken for a function from lists to lists."""
    with pytest.raises(InvalidRequestError, match="name the function itself"):
        function_engine(function_engine(words))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"task": "embed"}, "task must be"), ({"supports": ["heat"]}, "heat"), ({"name": ""}, "name")],
)
def test_options_are_checked_early(options: dict[str, Any], match: str) -> None:
    """A mistake is found where the engine is asked for, not where a caller waits."""
    with pytest.raises(InvalidRequestError, match=match):
        function_engine(words, **options)
