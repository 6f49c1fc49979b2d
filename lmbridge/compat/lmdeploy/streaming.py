"""Answers read while they grow: one prompt's stream as it is, several prompts' streams merged into one.

Rule: the caller's end. ``ResponseStream`` is what the caller holds; a source is what it reads from, and knows nothing
of it, so that a stream that is dropped is finalized at once and stops the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lmbridge.bridge import Bridge
from lmbridge.caller.streams import AsyncStream, Stream
from lmbridge.compat.lmdeploy.answers import Parts
from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.errors import ForkedError, LMBridgeError
from lmbridge.messages import GenerationConfig


@dataclass
class Ask:
    """One prompt with what the Bridge's verbs take for it."""

    index: int
    prompt: Any
    config: GenerationConfig
    options: Any  # CallOptions


class Source(Protocol):
    """Where a ResponseStream reads from; ``leave`` may be called by a finalizer."""

    def next(self) -> Response | None:
        """Block for the next part; None at the end."""

    def stop(self, index: int) -> None:
        """End the answer of that index; its last part says ``abort``. Any thread."""

    def leave(self) -> None:
        """Let all answers end, without waiting."""

    def close(self) -> None:
        """End all answers."""


class OneAnswer:
    """The parts of one prompt's answer."""

    def __init__(self, bridge: Bridge, ask: Ask) -> None:
        self._parts = Parts(ask.index)
        self._ended = False
        self._failure: Response | None = None
        self._stream: Stream | None = None
        try:
            self._stream = bridge.stream(ask.prompt, ask.config, **ask.options)
        except LMBridgeError as error:
            self._failure = self._parts.error(error)

    def next(self) -> Response | None:
        if self._ended:
            return None
        try:
            if self._stream is not None:
                return self._parts.part(next(self._stream))
        except StopIteration:
            self._failure = self._parts.end(self._stream.response)  # type: ignore[union-attr]
        except LMBridgeError as error:
            self._ended = True
            return self._parts.error(error)
        self._ended = True
        return self._failure

    def stop(self, index: int) -> None:
        self.close()

    def leave(self) -> None:
        pass  # the Bridge's stream is dropped with this one, and aborts

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class ManyAnswers:
    """The parts of several prompts' answers, in the order they come.

    A loop on a thread of its own reads the streams. Each has at most one part waiting here for the caller; what comes
    meanwhile merges in the Bridge, so that a slow caller holds nobody up and fills no memory.
    """

    def __init__(self, bridge: Bridge, asks: list[Ask]) -> None:
        self._bridge = bridge
        self._pid = os.getpid()
        self._parts: queue.SimpleQueue[tuple[int, Response | BaseException] | None] = queue.SimpleQueue()
        self._taken = {ask.index: asyncio.Event() for ask in asks}  # loop only, as is the next
        self._streams: dict[int, AsyncStream] = {}
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._pump_all(asks))
        self._ended = False  # caller only
        self._thread = threading.Thread(target=self._run, name="lmbridge stream_infer", daemon=True)
        self._thread.start()

    def next(self) -> Response | None:
        if os.getpid() != self._pid:
            raise ForkedError("This stream belongs to the parent process; a forked child cannot read it.")
        item = None if self._ended else self._parts.get()
        if item is None:
            self._ended = True
            return None
        index, part = item
        self._on_loop(self._taken[index].set)
        if isinstance(part, BaseException):
            raise part
        return part

    def stop(self, index: int) -> None:
        self._on_loop(lambda: self._leave_one(index))

    def leave(self) -> None:
        self._on_loop(self._task.cancel)

    def close(self) -> None:
        self.leave()
        if os.getpid() == self._pid:
            self._thread.join(10)

    def _leave_one(self, index: int) -> None:
        stream = self._streams.get(index)
        if stream is not None:
            self._loop.create_task(stream.aclose())

    def _on_loop(self, function: Callable[[], Any]) -> None:
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: all has been said
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
        finally:
            self._parts.put(None)
            self._loop.close()

    async def _pump_all(self, asks: list[Ask]) -> None:
        await asyncio.gather(*(self._pump(ask) for ask in asks))

    async def _pump(self, ask: Ask) -> None:
        parts, taken = Parts(ask.index), self._taken[ask.index]
        try:
            async with self._bridge.astream(ask.prompt, ask.config, **ask.options) as stream:
                self._streams[ask.index] = stream
                while (part := await _part(stream, parts)).finish_reason is None:
                    self._parts.put((ask.index, part))
                    await taken.wait()
                    taken.clear()
            self._parts.put((ask.index, part))
        except LMBridgeError as error:
            self._parts.put((ask.index, _failure(error, parts)))


async def _part(stream: AsyncStream, parts: Parts) -> Response:
    try:
        return parts.part(await stream.__anext__())
    except StopAsyncIteration:
        return parts.end(stream.response)


def _failure(error: LMBridgeError, parts: Parts) -> Response | BaseException:
    try:
        return parts.error(error)
    except LMBridgeError as raised:
        return raised


class WholeAnswers:
    """Another source's parts, each answer as one whole when it is complete."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._begun: dict[int, Response] = {}
        self.stop, self.leave, self.close = source.stop, source.leave, source.close

    def next(self) -> Response | None:
        while (part := self._source.next()) is not None:
            begun = self._begun.pop(part.index, None)
            answer = part if begun is None else begun.extend(part)
            if part.finish_reason is not None:
                return answer
            self._begun[part.index] = answer
        return None


class ResponseStream:
    """The parts of the answers, as they come: ``for out in pipe.stream_infer(...)``.

    Leaving the loop, ``close``, the end of a ``with`` and dropping the stream stop the engine. ``next`` reads
    by hand.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Response]:
        # A generator of its own: only the for loop holds it, so that `break` drops it and this finally runs at once.
        try:
            while (part := self._next()) is not None:
                yield part
        finally:
            self.close()

    def __next__(self) -> Response:
        """The next part.

        Raises:
            StopIteration: all answers are complete.
            RequestTimeoutError, BridgeClosedError, ForkedError: what ends the reading of all of them.
        """
        part = self._next()
        if part is None:
            raise StopIteration
        return part

    def close(self) -> None:
        """Stop what still runs. Any thread, any time."""
        self._source.close()

    def stop(self, index: int) -> None:
        """End the answer to that prompt; its last part says ``abort``, and the others go on. Any thread, any time."""
        self._source.stop(index)

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A finalizer may run in the middle of anything: no joining here.
        source = getattr(self, "_source", None)
        if source is not None:
            source.leave()

    def _next(self) -> Response | None:
        try:
            return self._source.next()
        except BaseException:  # KeyboardInterrupt too: nobody reads on
            self.close()
            raise
