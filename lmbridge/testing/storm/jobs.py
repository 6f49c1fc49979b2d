"""Ways of asking: for what a function makes of items, and for vectors of texts.

Rule: each way is a function of its caller, on that caller's thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from lmbridge.messages import Apply, Embed, Job
from lmbridge.testing.storm.caller import Caller
from lmbridge.testing.storm.question import Question


def done(job: Job) -> Any:
    """What the storm's engine makes of a job."""
    import numpy as np

    if isinstance(job, Apply):
        return "done", job.item
    assert isinstance(job, Embed)
    return np.array([zlib.crc32(str(job.text).encode()) % 65536], dtype=np.float32)


def call(caller: Caller) -> None:
    question = _question(caller)
    value = caller.open("call", question, caller.at.call, question.text)
    if value is not None:
        caller.judge.did(question, value == ("done", question.text))


def embed(caller: Caller) -> None:
    question = _question(caller)
    vector = caller.open("embed", question, caller.at.embed, question.text)
    if vector is not None:
        caller.judge.did(question, bool((vector == done(Embed(question.text))).all()))


def map_list(caller: Caller) -> None:
    questions = _questions(caller)
    values = caller.open("map", questions[0], caller.at.map, [question.text for question in questions])
    for question, value in zip(questions, values or (), strict=False):
        caller.judge.did(question, value == ("done", question.text))


def map_with_exceptions(caller: Caller) -> None:
    questions = _questions(caller)

    def verb(items: Any, **options: Any) -> Any:
        return caller.at.map(items, return_exceptions=True, **options)

    values = caller.open("map", questions[0], verb, [question.text for question in questions])
    for question, value in zip(questions, values or (), strict=False):
        question.same_terms(questions[0])
        if isinstance(value, BaseException):
            caller.failed(question, value, count=False)
            caller.judge.made(0, 1)  # it may have ended before there was room to send it
        else:
            caller.judge.did(question, value == ("done", question.text))


def gather(caller: Caller) -> None:
    """A list of vectors as one future, which may be cancelled."""
    questions = _questions(caller)
    future = caller.open("submit_embed", questions[0], caller.at.submit_embed, [one.text for one in questions])
    if future is None:
        return
    caller.judge.made(len(questions))
    if caller.chance.random() < 0.3:
        for question in questions:
            question.left = True
        future.cancel()
    try:
        with caller.post.waits("a future of vectors", questions[0].deadline):
            vectors = future.result()
    except BaseException as error:
        caller.failed(questions[0], error, slots=len(questions), count=False)
        return
    for question, vector in zip(questions, vectors, strict=True):
        caller.judge.did(question, bool((vector == done(Embed(question.text))).all()), count=False)


WAYS: dict[Callable[[Caller], None], int] = {call: 10, embed: 4, map_list: 3, map_with_exceptions: 2, gather: 3}


def _question(caller: Caller) -> Question:
    question = caller.question()
    question.limit = None
    return question


def _questions(caller: Caller) -> Sequence[Question]:
    """Several that go by one call."""
    questions = [_question(caller) for _ in range(caller.chance.randint(2, 12))]
    questions[0].request_id = None
    return questions
