"""Streams: the deltas of a group of requests as LMDeploy's parts.

Rule: the caller's end; one thread reads, any thread may stop or close. Only the reader references a stream, so a
dropped stream is freed at once, and with it its group, whose finalizer stops generation.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmbridge import Bridge, StreamGroup
from lmbridge.compat.lmdeploy.answers import Parts
from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.compat.lmdeploy.sessions import Turn
from lmbridge.errors import LMBridgeError
from lmbridge.messages import GenerationConfig


@dataclass
class Asked:
    """Prompts and the arguments of the Bridge's verbs."""

    prompts: list[Any]  # of Prompt; any mixture
    configs: list[GenerationConfig]
    options: Any  # CallOptions; one for all


class ResponseStream:
    """The parts of the answers, as they come: ``for out in pipe.stream_infer(...)``.

    ``close``, leaving a ``with`` block and dropping the stream stop generation; so does leaving a ``for`` loop that
    holds the only reference. Otherwise iteration resumes where the last ``for`` or ``next`` stopped.
    """

    def __init__(self, turns: Sequence[Turn | None], whole: bool) -> None:
        self._turns = turns  # by prompt; None for one without a session
        self._whole = whole  # each answer as one part
        self._group: StreamGroup | None = None  # set once, by the thread that sends; read by any thread
        self._stopped: set[int] = set()  # stopped answers; any thread, in atomic steps
        self._parts = [Parts(index) for index in range(len(turns))]  # reader only, like the rest
        self._begun: dict[int, Response] = {}  # partial answers to be returned whole
        self._ready: deque[Response] = deque()  # parts to return
        self._failed = False

    def send(self, bridge: Bridge, asked: Asked) -> None:
        """Send the prompts, once; the sessions are already claimed.

        Raises:
            LMBridgeError: sending failed for a reason other than the requests; nothing runs.
        """
        try:
            self._group = bridge.stream_many(asked.prompts, asked.configs, return_exceptions=True, **asked.options)
        except LMBridgeError as error:
            self._ready.extend([parts.error(error) for parts in self._parts])
            return
        for index in list(self._stopped):  # before there was anything to stop
            self._group.stop(index)

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        """The next part.

        Raises:
            StopIteration: all answers are complete.
            RuntimeError: another thread is reading.
            RequestTimeoutError, BridgeClosedError, ForkedError: ends the reading of all answers.
        """
        try:
            part = self._read()
            if part is None:
                raise StopIteration
            return part
        except BaseException as error:  # KeyboardInterrupt too: nobody reads on
            if type(error) not in (StopIteration, RuntimeError):  # RuntimeError says that another thread is reading
                self._failed = True
                self.close()
            raise

    def close(self) -> None:
        """Stop what is still running. Any thread, any time."""
        try:
            if self._group is not None:
                self._group.close()
        finally:
            for turn in self._turns:
                if turn is not None:
                    turn.end()

    def stop(self, index: int) -> None:
        """End the answer to that prompt; its last part says ``abort``; the others continue. Any thread, any time."""
        self._stopped.add(index)  # first: either we see the group below, or ``send`` sees this
        if (group := self._group) is not None:
            group.stop(index)

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the reader ---

    def _read(self) -> Response | None:
        """The next part; None at the end."""
        while not self._failed:
            with contextlib.suppress(IndexError):
                part = self._ready.popleft()
                turn = self._turns[part.index]
                if turn is not None:
                    turn.hear(part)
                return part
            if self._group is None:
                break
            try:
                index, delta = next(self._group)
            except StopIteration:
                break
            for part in self._parts[index].of(delta):
                self._add(part)
        return None

    def _add(self, part: Response) -> None:
        """Queue a part, at once or with the rest of its answer."""
        if self._whole:
            begun = self._begun.pop(part.index, None)
            part = part if begun is None else begun.extend(part)
            if part.finish_reason is None:
                self._begun[part.index] = part
                return
        self._ready.append(part)
