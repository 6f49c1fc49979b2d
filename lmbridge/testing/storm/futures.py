"""Futures that nobody waits for at once, and what is done when they end, much of it hostile.

Rule: callbacks run on the bridge's dispatcher, or on the thread that finds the future done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from random import Random
from typing import Any

from lmbridge.caller.futures import ResponseFuture
from lmbridge.testing.storm.judge import Judge
from lmbridge.testing.storm.question import Question
from lmbridge.testing.storm.watch import GRACE, Post, Watch

Callback = Callable[[Future[Any]], None]


class HostileExit(SystemExit):
    """A user's callback that ends its thread."""


class Asked:
    """A future, its question, and how often its callback has come."""

    def __init__(self, judge: Judge, question: Question, future: ResponseFuture) -> None:
        self.question = question
        self.future = future
        self._judge = judge
        self._lock = threading.Lock()
        self._calls = 0  # guarded by _lock
        future.add_done_callback(self._called)

    def cancel(self) -> None:
        """Cancel it; callbacks that raise do so here."""
        self.question.left = True
        with suppress(HostileExit):
            self.future.cancel()

    def judge_end(self) -> None:
        """It is done, and was counted when it was made: is its end right?"""
        try:
            response = self.future.result(0)
        except BaseException as error:
            self._judge.failed(self.question, error, count=False)
        else:
            self._judge.answered(self.question, response, count=False)

    def look(self) -> None:
        """The bridge has ended: is the future done?"""
        with suppress(BaseException):
            self.future.exception(GRACE)
        if self.future.done():
            self.judge_end()
        else:
            self._judge.fault("hung", f"a future of {self.question.text!r}, after the close")

    def look_at_callback(self) -> None:
        """Every thread that runs callbacks has ended: was this future's told once?"""
        with self._lock:
            calls = self._calls
        if calls != 1:
            self._judge.fault("uncounted", f"the callback of {self.question.text!r} came {calls} times")

    def _called(self, future: Future[Any]) -> None:
        with self._lock:
            self._calls += 1


def hostile(chance: Random, judge: Judge, watch: Watch, others: Sequence[Asked]) -> Callback:
    """A callback that does what it must not, or what it may and few try."""
    asks = _Asks(chance, judge, watch)
    return chance.choice([_raise, _exit, _claim_cancelled, _again, _cancelling(others), asks.infer, asks.submit])


def _raise(future: Future[Any]) -> None:
    raise ValueError("a callback that raises, by plan")


def _exit(future: Future[Any]) -> None:
    raise HostileExit(1)


def _claim_cancelled(future: Future[Any]) -> None:
    raise CancelledError("a callback that says so, by plan")


def _again(future: Future[Any]) -> None:
    future.cancel()
    future.add_done_callback(_raise)


def _cancelling(others: Sequence[Asked]) -> Callback:
    def cancel(future: Future[Any]) -> None:
        for other in others:
            other.cancel()

    return cancel


class _Asks:
    """A callback that calls the bridge."""

    def __init__(self, chance: Random, judge: Judge, watch: Watch) -> None:
        self._question = Question(chance)
        self._question.timeout = 0.2  # other futures wait for this callback
        self._judge = judge
        self._watch = watch

    def infer(self, future: Future[Any]) -> None:
        response = self._call("infer")
        if response is not None:
            self._judge.answered(self._question, response)

    def submit(self, future: Future[Any]) -> None:
        more = self._call("submit")
        if more is not None:
            self._judge.made(1)
            self._judge.scene.futures.append(Asked(self._judge, self._question, more))

    def _call(self, verb: str) -> Any:
        scene, question = self._judge.scene, self._question
        post = self._watch.add(Post(self._watch, "a callback", lambda: scene.closed_at))
        options = question.options()
        try:
            with post.waits(verb, question.deadline):
                return getattr(scene.bridge, verb)(question.prompt, **options)
        except BaseException as error:
            self._judge.failed(question, error)
            return None
        finally:
            post.leave()
