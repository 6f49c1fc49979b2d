"""Ways of asking: for whole answers, one or a list, and in conversations.

Rule: each way is a function of its caller, on that caller's thread.
"""

from __future__ import annotations

import time
from typing import Any

from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.testing.storm.caller import Caller
from lmbridge.testing.storm.question import Question

INVALID: tuple[Any, ...] = ("", 7, None, [{"role": "user"}], ["one", "two"], [-1], b"bytes")


def infer(caller: Caller) -> None:
    question = caller.question()
    response = caller.open("infer", question, caller.at.infer)
    if response is not None:
        caller.answered(question, response)


def infer_list(caller: Caller) -> None:
    questions = [caller.question() for _ in range(caller.chance.randint(2, 9))]
    questions[0].request_id = None
    answers = caller.open("a list", questions[0], caller.at.infer, [question.prompt for question in questions])
    for question, answer in zip(questions, answers or (), strict=False):
        question.same_terms(questions[0])
        caller.answered(question, answer)


def infer_list_with_exceptions(caller: Caller) -> None:
    questions = [caller.question() for _ in range(caller.chance.randint(2, 9))]
    questions[0].request_id = None

    def verb(prompts: Any, **options: Any) -> Any:
        return caller.at.infer(prompts, return_exceptions=True, **options)

    answers = caller.open("a list", questions[0], verb, [question.prompt for question in questions])
    for question, answer in zip(questions, answers or (), strict=False):
        question.same_terms(questions[0])
        if isinstance(answer, BaseException):
            caller.failed(question, answer, count=False)
            caller.judge.made(0, 1)  # it may have ended before there was room to send it
        else:
            caller.answered(question, answer)


def invalid(caller: Caller) -> None:
    """What is wrong raises at once, is not counted and harms nobody."""
    prompt = caller.chance.choice(INVALID)
    try:
        with caller.post.waits("an invalid call", time.monotonic()):
            caller.at.submit(prompt)
    except InvalidRequestError:
        return
    except LMBridgeError as error:  # closed, say
        caller.leaves = caller.scene.ends_with(error)
        return
    caller.judge.fault("mixed", f"{prompt!r} was taken")


def chat(caller: Caller) -> None:
    chat = caller.scene.bridge.chat()
    for _ in range(caller.chance.randint(1, 3)):
        question = caller.question()
        question.prompt = question.text
        if caller.chance.random() < 0.5:
            response = caller.open("a chat", question, chat.ask)
            if response is not None:
                caller.answered(question, response)
        else:
            _chat_in_pieces(caller, chat, question)


def _chat_in_pieces(caller: Caller, chat: Any, question: Question) -> None:
    deltas = caller.open("the opening of a chat's stream", question, chat.stream)
    if deltas is None:
        return
    caller.judge.made(1)
    heard = ""
    try:
        with caller.post.waits("a chat's stream", question.deadline):
            for delta in deltas:
                heard += delta.text
    except BaseException as error:
        caller.failed(question, error, count=False)
        return
    if question.limit is None and heard != question.text:
        caller.judge.fault("mixed", f"a chat said {heard!r} to {question.text!r}")
