"""Engines for the tests of the contract: some keep it, each written in another way, and some break it once.

Rule: tests alone use them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from lmbridge import Delta, Engine, GenerationConfig, Request
from lmbridge.engines.base import Sink
from lmbridge.messages import Usage
from lmbridge.testing import ScriptedEngine, prompt_text


class IteratorEngine(Engine):
    """An engine whose author wrote ``generate`` only; some prompts make it misbehave."""

    name = "iterator"
    max_batch_size = 4

    async def start(self) -> None:
        pass

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        text = prompt_text(request.prompt)
        if text == "raise at once":
            raise ValueError("at once")
        words = text.split(" ")
        for word in words[: request.config.max_new_tokens]:
            yield Delta(word + " ", [len(word)])
            await asyncio.sleep(0.001)
        if text == "raise later":
            raise ValueError("later")
        if text == "exit":
            raise SystemExit(1)
        if text != "end without a word":
            yield Delta(finish_reason="stop" if len(words) <= request.config.max_new_tokens else "length")


class ThreadEngine(Engine):
    """An engine that steps on a thread of its own, as those of libraries do, and tells when that ends."""

    name = "thread"
    supports = frozenset(GenerationConfig().__dict__)
    max_batch_size = 4

    def __init__(self) -> None:
        self._work: dict[str, tuple[Sink, list[str]]] = {}  # server thread only
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stepping", daemon=True)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def add_request(self, request: Request, sink: Sink) -> None:
        self._work[request.id] = sink, prompt_text(request.prompt).split(" ")[: request.config.max_new_tokens]

    def abort_request(self, request_id: str) -> None:
        sink, _ = self._work.pop(request_id, (None, None))
        if sink is not None:
            sink(Delta(finish_reason="abort"))

    def stats(self) -> dict[str, float]:
        return {"in_flight": float(len(self._work))}

    async def close(self) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()  # a millisecond

    def _run(self) -> None:
        try:
            while not self._closing.wait(0.001):
                self._loop.call_soon_threadsafe(self._step)
        except BaseException as error:
            self.ended(error)

    def ended(self, error: BaseException) -> None:
        """The thread can do no more."""
        self._loop.call_soon_threadsafe(self.on_death, error)

    def _step(self) -> None:
        for request_id, (sink, words) in list(self._work.items()):
            word = words.pop(0)
            if not words:
                del self._work[request_id]
            sink(Delta(f"{word} ", [1], finish_reason=None if words else "length"))


class _Steps(ScriptedEngine):
    """The scripted engine, as the wrong ones below start from it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(step_time=0.001, max_batch_size=4, **options)


class IgnoresMaxNewTokens(_Steps):
    """It claims the field and says the whole answer."""

    def add_request(self, request: Request, sink: Sink) -> None:
        request.config = GenerationConfig()
        super().add_request(request, sink)


class CountsThePromptTwice(_Steps):
    """The second request with a prompt is charged for both."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: dict[str, int] = {}

    def add_request(self, request: Request, sink: Sink) -> None:
        text = prompt_text(request.prompt)
        times = self._asked[text] = self._asked.get(text, 0) + 1

        def counted(delta: Delta) -> None:
            if delta.usage is not None:
                delta.usage.prompt_tokens *= times
            sink(delta)

        super().add_request(request, counted)


class CountsNoPrompt(_Steps):
    """It gives usage, without the prompt's tokens."""

    def add_request(self, request: Request, sink: Sink) -> None:
        super().add_request(request, lambda delta: sink(_with_usage(delta, prompt=0)))


class CountsTwoTokensTooMany(_Steps):
    """It counts tokens that it has not said, and more of them than one that ends the answer."""

    def add_request(self, request: Request, sink: Sink) -> None:
        super().add_request(request, lambda delta: sink(_with_usage(delta, more=2)))


class CountsOneTokenTooFew(_Steps):
    """It leaves one that it has said out."""

    def add_request(self, request: Request, sink: Sink) -> None:
        super().add_request(request, lambda delta: sink(_with_usage(delta, more=-1)))


class ForgetsOneOfTwoThatEndTogether(_Steps):
    """When two end in one step, the second hears nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self._ended_in: dict[int, int] = {}  # by length of the prompt, the step in which such a one has ended

    def add_request(self, request: Request, sink: Sink) -> None:
        length = len(prompt_text(request.prompt))

        def heard(delta: Delta) -> None:
            if delta.finish_reason == "stop":
                if self._ended_in.get(length) == self.steps:
                    return
                self._ended_in[length] = self.steps
            sink(delta)

        super().add_request(request, heard)


class EndsItsThreadSilently(ThreadEngine):
    """Its thread ends, and nobody hears of it."""

    def ended(self, error: BaseException) -> None:
        pass


class SaysMoreAfterTheEnd(_Steps):
    """One more delta follows the last."""

    def add_request(self, request: Request, sink: Sink) -> None:
        loop = asyncio.get_running_loop()

        def heard(delta: Delta) -> None:
            sink(delta)
            if delta.finish_reason == "stop":
                loop.call_soon(sink, Delta("more"))

        super().add_request(request, heard)


class EndsTwiceWhenAborted(_Steps):
    """The abort is told by whoever hears of it, and by the step that finds it."""

    def add_request(self, request: Request, sink: Sink) -> None:
        loop = asyncio.get_running_loop()

        def heard(delta: Delta) -> None:
            sink(delta)
            if delta.finish_reason == "abort":
                loop.call_soon(sink, delta)

        super().add_request(request, heard)


def _with_usage(delta: Delta, prompt: int | None = None, more: int = 0) -> Delta:
    if delta.usage is not None:
        known = delta.usage
        delta.usage = Usage(known.prompt_tokens if prompt is None else prompt, known.completion_tokens + more)
    return delta


class CallsNothing(_Steps):
    """It takes tools, and answers as if there were none."""


class IgnoresAborts(_Steps):
    """It goes on to the end, whoever has left."""

    def abort_request(self, request_id: str) -> None:
        pass


class SpeaksOnItsOwnThread(_Steps):
    """It calls a sink where the words are made."""

    def add_request(self, request: Request, sink: Sink) -> None:
        def heard(delta: Delta) -> None:
            speaker = threading.Thread(target=sink, args=(delta,), name="speaker")
            speaker.start()
            speaker.join()

        super().add_request(request, heard)
