"""Ways of asking: for answers that are read while they grow.

Rule: each way is a function of its caller, on that caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lmbridge.errors import LMBridgeError
from lmbridge.messages import Response
from lmbridge.testing.storm.asking import infer
from lmbridge.testing.storm.caller import Caller
from lmbridge.testing.storm.question import Question


def stream(caller: Caller) -> None:
    question = caller.question()
    stream = caller.open("the opening of a stream", question, caller.at.stream)
    if stream is not None:
        caller.judge.made(1)
        _share(caller, question, stream)
        _read(caller, question, stream)


def stream_and_infer(caller: Caller) -> None:
    """Ask while reading: the nested call borrows another pair of queues."""
    question = caller.question()
    stream = caller.open("the opening of a stream", question, caller.at.stream)
    if stream is not None:
        caller.judge.made(1)
        _read(caller, question, stream, each=lambda: infer(caller))


def stream_and_leave(caller: Caller) -> None:
    question = caller.question()
    stream = caller.open("the opening of a stream", question, caller.at.stream)
    if stream is None:
        return
    caller.judge.made(1)
    question.left = True
    leave = caller.chance.choice([_break_off, _close, _leave_with, _drop, _interrupt])
    try:
        with caller.post.waits(f"a stream that is left ({leave.__name__})", question.deadline):
            leave(stream)
    except LMBridgeError as error:
        caller.failed(question, error, count=False)
        return
    if leave is not _drop:
        _judge_response(caller, question, stream)


def _read(caller: Caller, question: Question, stream: Any, each: Callable[[], None] = lambda: None) -> None:
    heard, deltas = "", iter(stream)
    try:
        while True:
            with caller.post.waits("a stream's next delta", question.deadline):
                delta = next(deltas, None)
            if delta is None:
                break
            heard += delta.text
            each()
    except BaseException as error:
        caller.failed(question, error, count=False)
        return
    response = _judge_response(caller, question, stream)
    if response is not None and response.text != heard:
        caller.judge.fault("mixed", f"a stream said {heard!r} and then answered {response.text!r}")


def _judge_response(caller: Caller, question: Question, stream: Any) -> Response | None:
    try:
        response: Response = stream.response
    except BaseException as error:
        caller.failed(question, error, count=False)
        return None
    caller.answered(question, response, count=False)
    return response


def _share(caller: Caller, question: Question, stream: Any) -> None:
    """Now and then somebody else may close the stream, or abort it by its id."""
    roll = caller.chance.random()
    if roll < 0.1:
        question.left = True
        caller.scene.streams.append(stream)
    elif roll < 0.2:
        caller.scene.ids.append(stream.request_id)


def group(caller: Caller) -> None:
    questions = [caller.question() for _ in range(caller.chance.randint(1, 5))]
    group = caller.open("the opening of a group", questions[0], caller.at.stream_many, [q.prompt for q in questions])
    if group is None:
        return
    leave = caller.chance.random() < 0.3
    for question in questions:
        question.same_terms(questions[0])
        question.left = question.left or leave
    reads = caller.chance.randint(0, 3) if leave else 10**6
    try:
        with caller.post.waits("a group", questions[0].deadline):
            for _ in group:
                reads -= 1
                if reads <= 0:
                    break
        if leave:
            group.close()
    except BaseException as error:
        caller.judge.fault("mixed", f"a group raised {error!r}")
        caller.judge.made(0, len(questions))
        return
    for question, end in zip(questions, group.responses, strict=True):
        if isinstance(end, BaseException):
            caller.failed(question, end, count=False)
            caller.judge.made(0, 1)  # it may have ended before there was room to send it
        else:
            caller.answered(question, end)


def _break_off(stream: Any) -> None:
    for _ in stream:
        break
    stream.close()  # it may have been the last


def _close(stream: Any) -> None:
    stream.close()


def _leave_with(stream: Any) -> None:
    with stream:
        next(stream, None)


def _drop(stream: Any) -> None:
    next(stream, None)


def _interrupt(stream: Any) -> None:
    with suppress(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError
    stream.close()
