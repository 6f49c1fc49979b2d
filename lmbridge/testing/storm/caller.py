"""One caller on a thread, and what all ways of asking share.

Rule: the thread it asks on. Whatever may block stands at the post; whatever ends is told to the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from lmbridge.messages import Response
from lmbridge.testing.storm.judge import Judge
from lmbridge.testing.storm.question import Question
from lmbridge.testing.storm.watch import Post, Watch


class Caller:
    """One caller in one round, at a bridge or at a client of its own."""

    def __init__(self, judge: Judge, watch: Watch, chance: Random, post: Post, at: Any = None) -> None:
        self.leaves = False  # it was told that nobody is served here any more
        self.judge = judge
        self.scene = judge.scene
        self.watch = watch
        self.chance = chance
        self.post = post
        self.at = self.scene.bridge if at is None else at

    def question(self) -> Question:
        return Question(self.chance)

    def failed(self, question: Question, error: BaseException, slots: int = 1, count: bool = True) -> None:
        self.judge.failed(question, error, slots, count)
        if self.scene.ends_with(error):
            self.leaves = True
        elif self.scene.plan.reject:
            self.scene.over.wait(self.chance.uniform(0.0, 0.01))  # as one does who was refused

    def answered(self, question: Question, response: Response, count: bool = True) -> None:
        self.judge.answered(question, response, count)

    def open(self, what: str, question: Question, verb: Callable[..., Any], prompt: Any = None) -> Any:
        """What the verb returns; None when it raised."""
        options = question.options()
        if question.request_id is not None:
            self.scene.ids.append(question.request_id)
        try:
            with self.post.waits(what, question.deadline):
                return verb(question.prompt if prompt is None else prompt, **options)
        except BaseException as error:
            self.failed(question, error, len(prompt) if isinstance(prompt, list) else 1)
            return None


class Visitor(Caller):
    """Asks by a client that may be closed at any moment."""

    def question(self) -> Question:
        question = Question(self.chance)
        question.left = True
        return question

    def failed(self, question: Question, error: BaseException, slots: int = 1, count: bool = True) -> None:
        self.judge.failed(question, error, slots, count)
