"""One request inside llama.cpp: a call that blocks its thread until the answer is complete or aborted.

Rule: ``Call.make`` and what it calls run on a slot's thread, the rest on the server thread; each field says which. News
reaches the server thread by one doorbell, rung once however many threads have news.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from lmbridge.engines.llamacpp.forms import Form

Handle = Callable[[str, Callable[[str], bool]], None]
"""xllamacpp's: takes JSON and a callback, which gets JSON and returns whether to stop. It blocks."""


class Bell:
    """Rung by any slot's thread; answered on the loop, once for any number of rings."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rang: deque[Call] = deque()  # appended by any thread, emptied by the server thread
        self._rung = False  # set after the append, cleared before the emptying: nobody is missed

    def ring(self, call: Call) -> None:
        """Signal news of the call. Any thread."""
        self._rang.append(call)
        if not self._rung:
            self._rung = True
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False
        while self._rang:
            self._rang.popleft().news.set()


class Call:
    """One request, from the first message to the last.

    Attributes:
        heard: how many messages have come; also changes while a prompt is read. Slot's thread.
        news: there may be messages to read. Server thread.
        form: the form of the answer. Set by the slot's thread before the first message, then the server thread's.
    """

    def __init__(self, bell: Bell) -> None:
        self.heard = 0
        self.news = asyncio.Event()
        self.form: Form | None = None
        self._bell = bell
        self._words: deque[dict[str, Any]] = deque()  # appended by the slot's thread, emptied by the server thread
        self._stopped = False  # set by the server thread, read by the slot's
        self._failure: BaseException | None = None  # slot's thread only

    def make(self, handle: Handle, body: str) -> None:
        """Call llama.cpp and return when it has finished. Slot's thread."""
        if self._stopped:
            return
        listener = self._listen()
        next(listener)
        with contextlib.closing(listener):
            handle(body, listener.send)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Abort in llama.cpp at its next message: a token, or a chunk of the prompt."""
        self._stopped = True

    async def words(self, work: asyncio.Task[None]) -> list[dict[str, Any]]:
        """Wait for new messages; empty once ``work``, the call, has ended."""
        while True:
            self.news.clear()
            ended = work.done()  # read first, so that earlier messages are complete
            words = []
            while self._words:
                words.append(self._words.popleft())
            if words or ended:
                return words
            await self.news.wait()

    def _listen(self) -> Generator[bool, str, None]:
        """Receives llama.cpp's messages; yields whether to stop.

        A generator, because an exception thrown into this thread strikes at the callback's first instruction. xllamacpp
        swallows what a callback raises and goes on; a generator's first instruction is inside its try.
        """
        try:
            while True:
                self._take((yield self._stopped))
        except GeneratorExit:
            return
        except BaseException as cause:
            self._failure = cause
        while True:
            yield True

    def _take(self, word: str) -> None:
        self._words.append(json.loads(word))
        self.heard += 1
        self._bell.ring(self)
