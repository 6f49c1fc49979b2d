"""Ways of asking: for futures.

Rule: each way is a function of its caller, on that caller's thread.
"""

from __future__ import annotations

import time
from concurrent.futures import as_completed
from contextlib import suppress

from lmbridge.testing.storm.caller import Caller
from lmbridge.testing.storm.futures import Asked, HostileExit, hostile


def _submit(caller: Caller) -> Asked | None:
    question = caller.question()
    future = caller.open("submit", question, caller.at.submit)
    if future is None:
        return None
    caller.judge.made(1)
    return Asked(caller.judge, question, future)


def submit(caller: Caller) -> None:
    asked = _submit(caller)
    if asked is not None:
        if caller.chance.random() < 0.5:
            _with_callback(caller, asked, [])
        _wait(caller, asked)


def submit_many(caller: Caller) -> None:
    several = [asked for _ in range(caller.chance.randint(2, 6)) if (asked := _submit(caller)) is not None]
    for asked in several:
        if caller.chance.random() < 0.3:
            others = [other for other in several if other is not asked]
            for other in others:
                other.question.left = True
            _with_callback(caller, asked, others)
    deadlines = [asked.question.deadline for asked in several]
    latest = None if None in deadlines or not deadlines else max(deadlines)  # type: ignore[type-var]
    with caller.post.waits("as_completed", latest):
        for _ in as_completed([asked.future for asked in several]):
            pass
    for asked in several:
        asked.judge_end()


def submit_and_cancel(caller: Caller) -> None:
    asked = _submit(caller)
    if asked is None:
        return
    if caller.chance.random() < 0.5:
        _with_callback(caller, asked, [])
    caller.scene.over.wait(caller.chance.choice((0.0, 0.0, 0.001, 0.01)))
    with caller.post.waits("cancel", time.monotonic()):
        asked.cancel()
    _wait(caller, asked)


def submit_and_go(caller: Caller) -> None:
    """Nobody waits for it: it must end by itself all the same."""
    asked = _submit(caller)
    if asked is not None:
        if caller.chance.random() < 0.5:
            _with_callback(caller, asked, [])
        caller.scene.futures.append(asked)


def _with_callback(caller: Caller, asked: Asked, others: list[Asked]) -> None:
    with suppress(HostileExit, ValueError):  # it is done already: the callback runs here
        asked.future.add_done_callback(hostile(caller.chance, caller.judge, caller.watch, others))


def _wait(caller: Caller, asked: Asked) -> None:
    with suppress(BaseException), caller.post.waits("a future", asked.question.deadline):
        asked.future.exception()
    asked.judge_end()
