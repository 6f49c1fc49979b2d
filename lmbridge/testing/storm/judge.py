"""Whether an end is right, and how many calls there were.

Rule: asked by any thread about what it has seen; knows neither how calls are made nor what is done to the bridge.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError

from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
)
from lmbridge.messages import Response
from lmbridge.testing.storm.question import Question
from lmbridge.testing.storm.scene import Scene

FAULTS = ("mixed", "hung", "leaked", "uncounted")
SHOWN = 20  # how many faults of a kind are told whole


class Books:
    """What a storm has seen, over all rounds.

    Attributes:
        requests: calls made so far, one for each prompt.
        faults: how often what must not be has been seen: ``mixed`` (an end that is not this call's own: another's
            text, an error out of place), ``hung``, ``leaked``, ``uncounted``.
        ends: how the calls ended.
        met: which acts of saboteurs they have met.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._told: Counter[str] = Counter()  # guarded by _lock, as are the next four
        self.requests = 0
        self.ends: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.faults: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))

    def ended(self, name: str, requests: int) -> None:
        """A call has ended so; it was this many requests that were not counted before."""
        with self._lock:
            self.requests += requests
            if name:
                self.ends[name] += 1

    def act(self, name: str) -> None:
        """A saboteur has done this."""
        with self._lock:
            self.met[name] += 1

    def fault(self, kind: str, what: str, count: int = 1) -> None:
        """Something happened that must not."""
        with self._lock:
            self.faults[kind] += count
            shown = self._told[kind] = self._told[kind] + 1
        if shown <= SHOWN:
            self._say(f"{kind.upper()}: {what}")


class Judge:
    """Judges the ends of one round's calls."""

    def __init__(self, books: Books, scene: Scene) -> None:
        self.books = books
        self.scene = scene

    def fault(self, kind: str, what: str, count: int = 1) -> None:
        self.books.fault(kind, f"{what}; {self.scene}", count)

    def answered(self, question: Question, response: Response, count: bool = True) -> None:
        """A call has ended with an answer. ``count=False`` where the call was counted when it was made."""
        wrong = question.wrong_with(response)
        if not wrong and response.finish_reason == "abort" and not question.left:
            wrong = "says that it was left, and was not"
        if wrong:
            self.fault("mixed", f"{question.text!r}: {wrong}")
        self._ended(response.finish_reason, (1, 1) if count else (0, 0))

    def did(self, question: Question, right: bool, count: bool = True) -> None:
        """A job has ended, with what is right for this question or with something else."""
        if not right:
            self.fault("mixed", f"{question.text!r}: another's result")
        self._ended("done", (1, 1) if count else (0, 0))

    def failed(self, question: Question, error: BaseException, slots: int = 1, count: bool = True) -> None:
        """A call, or a list of ``slots`` of them, has ended with an error."""
        wrong, partial = _out_of_place(self.scene, question, error), getattr(error, "partial", "")
        if not wrong and slots == 1 and not question.begins_with(partial):
            wrong = f"a foreign beginning of an answer, {partial!r}"
        if wrong:
            self.fault("mixed", f"{question.text!r}: {wrong}: {error!r}, caused by {error.__cause__!r}")
        self._ended(type(error).__name__, _requests_of(error, slots) if count else (0, 0))

    def made(self, certain: int, possible: int | None = None) -> None:
        """So many calls were made whose ends will be told later, or are nobody's."""
        self._ended("", (certain, certain if possible is None else possible))

    def _ended(self, name: str, made: tuple[int, int]) -> None:
        self.books.ended(name, made[1])
        self.scene.count(*made)


def _requests_of(error: BaseException, slots: int) -> tuple[int, int]:
    """How many of a failed call's ``slots`` requests the bridge must have counted, and how many it may have.

    It counts those that have asked for room; a deadline may pass, and a list may fail, before it is their turn to ask.
    """
    sent = slots == 1 and getattr(error, "request_id", None) is not None and not isinstance(error, RequestTimeoutError)
    return int(sent or isinstance(error, QueueFullError)), slots


def _out_of_place(scene: Scene, question: Question, error: BaseException) -> str:
    """Why this error may not have come; "" when it may."""
    for kind, reason in _PLACES:
        if isinstance(error, kind):
            return reason(scene, question, error)
    return "nothing that a caller may get"


def _timeout(scene: Scene, question: Question, error: BaseException) -> str:
    if question.deadline is None:
        return "there was no deadline"
    return "too early" if time.monotonic() < question.deadline else ""


def _closed(scene: Scene, question: Question, error: BaseException) -> str:
    if question.left:
        return ""
    if not scene.closing:
        return "the bridge was not closed"
    promised, until = scene.promised
    kept = getattr(error, "request_id", None) not in promised or time.monotonic() >= until
    return "" if kept else "the bridge promised to finish it"


_PLACES: list[tuple[type[BaseException], Callable[[Scene, Question, BaseException], str]]] = [
    (RequestTimeoutError, _timeout),
    (BridgeClosedError, _closed),
    (RequestAbortedError, lambda scene, question, error: ""),  # anybody may abort any request by its id
    (QueueFullError, lambda scene, question, error: "" if scene.plan.reject else "the gate was to block"),
    (EngineStartError, lambda scene, question, error: "" if scene.plan.deadly else "no engine failed to load"),
    (EngineDeadError, lambda scene, question, error: "" if scene.plan.deadly else "no engine died"),
    (EngineError, lambda scene, question, error: "" if scene.plan.flawed else "no request was to fail"),
    (CancelledError, lambda scene, question, error: "" if question.left else "nobody cancelled it"),
]
