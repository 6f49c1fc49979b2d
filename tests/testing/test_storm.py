"""The storm that anyone can run, in small; and that it would tell of what it looks for."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from random import Random

import pytest

from lmbridge import Response
from lmbridge.errors import EngineDeadError, RequestTimeoutError
from lmbridge.messages import Timings, Usage
from lmbridge.testing.storm import watch as watching
from lmbridge.testing.storm.judge import Books, Judge
from lmbridge.testing.storm.plan import plans
from lmbridge.testing.storm.question import Question
from lmbridge.testing.storm.scene import Scene
from lmbridge.testing.storm.watch import Post, Watch

VERDICT = re.compile(r"requests (\d+)  mixed 0  hung 0  leaked 0  uncounted 0  \(seed \d+, [\d.]+ s, \d+ calls/s\)")


def storm(requests: int, seed: int) -> None:
    """Run a storm as a user does."""
    command = [sys.executable, "-m", "lmbridge.testing.storm", "--requests", str(requests), "--seed", str(seed)]
    run = subprocess.run(command, capture_output=True, text=True)
    verdict = VERDICT.fullmatch(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert verdict is not None, run.stdout
    assert int(verdict[1]) >= requests


def test_a_breeze() -> None:
    """A thousand calls of all kinds beside faults: nobody is mixed up, hung, left over or uncounted."""
    storm(1000, seed=3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_storm() -> None:
    """So too with 20,000, which meet every kind of fault."""
    storm(20_000, seed=1)


@pytest.fixture
def judge() -> Judge:
    """A judge of calls in a round where no engine dies."""
    plan = next(plan for plan in plans(1) if not plan.deadly)
    return Judge(Books(lambda line: None), Scene(0, plan, None))


def question() -> Question:
    asked = Question(Random(1))
    asked.limit = asked.timeout = asked.request_id = None
    return asked


def answer(text: str) -> Response:
    words = text.split(" ")
    return Response(text, list(range(1, len(words) + 1)), "stop", Usage(1, len(words)), Timings())


def test_a_foreign_word_is_seen(judge: Judge) -> None:
    """An answer that holds another prompt's word is told of; the call's own is not."""
    asked = question()
    judge.answered(asked, answer(asked.text))
    assert judge.books.faults["mixed"] == 0
    judge.answered(asked, answer(" ".join([*asked.words[:-1], "another"])))
    assert judge.books.faults["mixed"] == 1


def test_an_error_out_of_place_is_seen(judge: Judge) -> None:
    """A call must not end by a deadline that it does not have, an engine that did not die, or an error of nobody's."""
    for count, error in enumerate((RequestTimeoutError("late"), EngineDeadError("dead"), KeyError("what")), 1):
        judge.failed(question(), error)
        assert judge.books.faults["mixed"] == count


def test_a_call_that_goes_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that outlives its deadline is told of while it still waits, with the place where it stands."""
    monkeypatch.setattr(watching, "GRACE", 0.1)
    monkeypatch.setattr(watching, "INTERVAL", 0.01)
    told: list[str] = []
    seen = threading.Event()

    def tell(post: Post, what: str) -> None:
        told.append(what)
        seen.set()

    watch = Watch(tell)
    watch.start()
    with watch.add(Post(watch, "a caller")).waits("a call", time.monotonic()):
        assert seen.wait(10)
    watch.end()
    (what,) = told
    assert "a call for" in what
    assert "test_a_call_that_goes_on_is_seen" in what
    assert watch.latest >= 0.1
