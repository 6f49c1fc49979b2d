"""Everybody who asks: threads that stay for the whole storm and go from round to round.

Rule: each caller runs on a thread of its own; the main thread opens rounds and waits until they were left.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from random import Random

from lmbridge.testing.storm.caller import Caller
from lmbridge.testing.storm.judge import Books, Judge
from lmbridge.testing.storm.loops import crowd
from lmbridge.testing.storm.watch import GRACE, PATIENCE, Post, Watch
from lmbridge.testing.storm.ways import ask


class Crew:
    """The callers.

    Args:
        threads, loops: how many threads ask by themselves, and how many run a loop whose tasks ask.
        more: whether there is anything left to ask.
    """

    def __init__(
        self, seed: int, threads: int, loops: int, books: Books, watch: Watch, more: Callable[[], bool]
    ) -> None:
        self._seed = seed
        self._books = books
        self._watch = watch
        self._more = more
        self._stage = threading.Condition()
        self._judge: Judge | None = None  # of the round that is on; guarded by _stage, as are the next three
        self._inside: set[threading.Thread] = set()  # who may still be calling in it
        self._lost: set[threading.Thread] = set()  # who hangs
        self._ended = False
        self._threads = [
            threading.Thread(target=self._stay, args=(number, number >= threads), name=f"storm {number}", daemon=True)
            for number in range(threads + loops)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def enter(self, judge: Judge) -> None:
        """Have everybody ask in this round."""
        with self._stage:
            self._judge = judge
            self._inside = set(self._threads) - self._lost
            self._stage.notify_all()

    def wait_until_left(self) -> None:
        """Return when everybody has left the round, or hangs in it."""
        with self._stage:
            self._stage.wait_for(lambda: self._inside <= self._lost, PATIENCE + 2 * GRACE)
            stuck = self._inside - self._lost
        for thread in stuck:
            self.lose(thread, f"{thread.name} has not left the round")

    def lose(self, thread: threading.Thread, how: str) -> None:
        """A thread hangs: nobody waits for it any more."""
        self._books.fault("hung", how)
        with self._stage:
            self._lost.add(thread)
            self._stage.notify_all()

    @property
    def hangs(self) -> bool:
        """Whether anybody does."""
        return bool(self._lost)

    @property
    def gone(self) -> bool:
        """Whether everybody hangs."""
        with self._stage:
            return self._lost.issuperset(self._threads)

    def end(self) -> None:
        """Let everybody go home."""
        with self._stage:
            self._ended = True
            self._stage.notify_all()
        for thread in set(self._threads) - self._lost:
            thread.join(GRACE)

    # --- one caller, on its own thread ---

    def _stay(self, number: int, with_loop: bool) -> None:
        """Go from round to round."""
        chance, judge = Random(f"{self._seed}/caller/{number}"), None
        while (judge := self._next(judge)) is not None:
            try:
                if with_loop:
                    asyncio.run(crowd(judge, self._watch, chance, self._more))
                else:
                    self._ask(judge, chance)
            except BaseException as error:
                judge.fault("mixed", f"{threading.current_thread().name} ended with {error!r}")
            with self._stage:
                self._inside.discard(threading.current_thread())
                self._stage.notify_all()

    def _ask(self, judge: Judge, chance: Random) -> None:
        scene = judge.scene
        post = self._watch.add(Post(self._watch, threading.current_thread().name, lambda: scene.closed_at))
        caller = Caller(judge, self._watch, chance, post)
        while not scene.over.is_set() and not caller.leaves and self._more():
            ask(caller)
        post.leave()

    def _next(self, before: Judge | None) -> Judge | None:
        with self._stage:
            self._stage.wait_for(lambda: self._ended or self._judge is not before)
            return None if self._ended else self._judge
