"""The engine contract: engines that keep it, and engines that break it in one way and are found by the right test."""

from __future__ import annotations

import textwrap
import unittest
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Bridge, Engine, EngineError
from lmbridge.testing import EngineContract, ScriptedEngine
from tests.testing import engines
from tests.testing.engines import IteratorEngine, ThreadEngine

PROMPTS = [f"prompt number {number} of several" for number in range(6)]
LONG = "word " * 300
DOCS = Path(__file__).parents[2] / "docs" / "engines" / "own.rst"


class TestScriptedEngine(EngineContract):
    """The scripted engine keeps the contract."""

    prompts = PROMPTS
    long_prompt = LONG
    follows_forms = False
    stall_timeout = 0.4

    def engine(self) -> Engine:
        return ScriptedEngine(step_time=0.001, max_batch_size=4)


class TestIteratorEngine(EngineContract):
    """So does an engine that only yields."""

    prompts = PROMPTS
    long_prompt = LONG
    stall_timeout = 0.4

    def engine(self) -> Engine:
        return IteratorEngine()


class TestThreadEngine(EngineContract):
    """So does an engine that steps on a thread of its own."""

    prompts = PROMPTS
    long_prompt = LONG
    workers = ("stepping",)
    follows_forms = False
    stall_timeout = 0.4

    def engine(self) -> Engine:
        return ThreadEngine()


def example_of_docs(capsys: pytest.CaptureFixture[str], after_words: str, name: str, prints: str) -> type[Engine]:
    """An engine of docs/engines/own.rst, whose example has run as it stands there."""
    after = DOCS.read_text().split(after_words, 1)[1]
    lines = after.splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith(" "))
    names: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(lines[:end])), names)
    assert capsys.readouterr().out.strip() == prints
    engine: type[Engine] = names[name]
    return engine


class TestShout(EngineContract):
    """So does the engine that the documentation shows, which readers copy."""

    prompts = PROMPTS
    long_prompt = LONG
    stall_timeout = 0.4

    @pytest.fixture(autouse=True)
    def _example(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.shout = example_of_docs(capsys, "leaving the iterator is the abort::", "Shout", "HELLO WORLD")

    def engine(self) -> Engine:
        return self.shout()


class TestPushing(EngineContract):
    """So does the one that it shows for libraries with a thread of their own."""

    prompts = PROMPTS
    long_prompt = LONG
    stall_timeout = 0.4

    @pytest.fixture(autouse=True)
    def _example(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.pushing = example_of_docs(capsys, "``abort_request`` instead::", "Pushing", "hello again")

    def engine(self) -> Engine:
        return self.pushing()


WRONG: list[tuple[type[Engine], str]] = [
    (engines.IgnoresMaxNewTokens, "test_max_new_tokens_is_kept"),
    (engines.CountsThePromptTwice, "test_usage_counts_what_was_said"),
    (engines.CountsNoPrompt, "test_usage_counts_what_was_said"),
    (engines.CountsTwoTokensTooMany, "test_usage_counts_what_was_said"),
    (engines.CountsOneTokenTooFew, "test_usage_counts_what_was_said"),
    (engines.ForgetsOneOfTwoThatEndTogether, "test_answers_do_not_mix"),
    (engines.EndsItsThreadSilently, "test_the_end_of_its_own_thread_is_told"),
    (engines.SaysMoreAfterTheEnd, "test_nothing_is_said_after_the_end"),
    (engines.EndsTwiceWhenAborted, "test_nothing_is_said_after_the_end"),
    (engines.CallsNothing, "test_a_tool_is_called"),
    (engines.IgnoresAborts, "test_abort_while_queued_working_and_finished"),
    (engines.SpeaksOnItsOwnThread, "test_answers_do_not_mix"),
]


BESIDE: dict[type[Engine], set[str]] = {
    engines.ForgetsOneOfTwoThatEndTogether: {"test_twenty_streams_at_once_do_not_mix"}
}
"""Where chance decides whether another test finds the same fault."""
ALONE = "test_close_with_work_in_flight"  # it looks at all of the process's threads


def failures(kind: type[Engine], tests: Iterable[str]) -> dict[str, BaseException]:
    """What an engine's author sees who runs the contract: the tests that fail, with their errors."""

    class Contract(EngineContract):
        prompts = PROMPTS
        long_prompt = "word " * 100
        workers = ("stepping",) if issubclass(kind, ThreadEngine) else ()
        follows_forms = kind is engines.CallsNothing
        patience = 4.0
        stall_timeout = 0.5

        def engine(self) -> Engine:
            return kind()

    found: dict[str, BaseException] = {}
    for name in tests:
        try:
            getattr(Contract(), name)()
        except unittest.SkipTest:
            continue
        except Exception as error:
            found[name] = error
    return found


@pytest.fixture(scope="module")
def found() -> dict[type[Engine], dict[str, BaseException]]:
    """What the contract finds wrong with each engine; all are tried at once, for most of it is waiting."""
    kinds, tests = [kind for kind, _ in WRONG], [name for name in vars(EngineContract) if name.startswith("test_")]
    with ThreadPoolExecutor(len(kinds)) as pool:
        at_once = pool.map(lambda kind: failures(kind, [name for name in tests if name != ALONE]), kinds)
        shared = dict(zip(kinds, at_once, strict=True))
    return {kind: {**shared[kind], **failures(kind, [ALONE])} for kind in kinds}


@pytest.mark.parametrize(("kind", "test"), WRONG, ids=[kind.__name__ for kind, _ in WRONG])
def test_an_engine_that_breaks_the_contract_once(
    kind: type[Engine], test: str, found: dict[type[Engine], dict[str, BaseException]]
) -> None:
    """An engine that is wrong in one way fails the one test that names it, so that its author knows where to look."""
    beside = BESIDE.get(kind, set())
    assert {test} <= set(found[kind]) <= {test, *beside}, found[kind]


@pytest.mark.parametrize(
    ("prompt", "partial"),
    [
        ("raise at once", ""),
        ("raise later", "raise later "),
        ("exit", "exit "),
        ("end without a word", "end without a word "),
    ],
)
def test_an_iterator_that_misbehaves(prompt: str, partial: str) -> None:
    """Wherever an iterator fails, its own caller gets an EngineError with the text so far; the next call is served."""
    with Bridge(IteratorEngine) as bridge:
        with pytest.raises(EngineError) as caught:
            bridge.infer(prompt, timeout=10)
        assert caught.value.partial == partial
        assert bridge.infer("good words", timeout=10).text == "good words "
