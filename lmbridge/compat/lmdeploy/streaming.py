"""Answers read while they grow: the deltas of a group of requests as LMDeploy's parts.

Rule: the caller's end; one thread reads, any thread may stop or close. Only its reader refers to a stream, so that one
that is dropped is gone at once, and its group with it, whose finalizer stops the engine.
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
    """Prompts, with what the Bridge's verbs take for them."""

    prompts: list[Any]  # of Prompt; any mixture
    configs: list[GenerationConfig]
    options: Any  # CallOptions; one for all


class ResponseStream:
    """The parts of the answers, as they come: ``for out in pipe.stream_infer(...)``.

    ``close``, the end of a ``with`` and dropping the stream stop the engine; so does leaving a ``for`` loop that alone
    holds it. One that is held goes on where the last ``for`` or ``next`` stopped.
    """

    def __init__(self, turns: Sequence[Turn | None], whole: bool) -> None:
        self._turns = turns  # by prompt; None for one without a session
        self._whole = whole  # each answer as one part
        self._group: StreamGroup | None = None  # set once, by the thread that sends; read by any thread
        self._stopped: set[int] = set()  # answers that somebody has ended; any thread, in whole steps
        self._parts = [Parts(index) for index in range(len(turns))]  # reader only, as are the rest
        self._begun: dict[int, Response] = {}  # whole answers as far as they have come
        self._ready: deque[Response] = deque()  # parts to be handed out
        self._failed = False

    def send(self, bridge: Bridge, asked: Asked) -> None:
        """Send the prompts, the sessions being claimed; once.

        Raises:
            LMBridgeError: nothing runs, and not for a reason of the requests' own.
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
            RuntimeError: another thread reads already.
            RequestTimeoutError, BridgeClosedError, ForkedError: what ends the reading of all of them.
        """
        try:
            part = self._read()
            if part is None:
                raise StopIteration
            return part
        except BaseException as error:  # KeyboardInterrupt too: nobody reads on
            if type(error) not in (StopIteration, RuntimeError):  # that one says that another thread reads
                self._failed = True
                self.close()
            raise

    def close(self) -> None:
        """Stop what still runs. Any thread, any time."""
        try:
            if self._group is not None:
                self._group.close()
        finally:
            for turn in self._turns:
                if turn is not None:
                    turn.end()

    def stop(self, index: int) -> None:
        """End the answer to that prompt; its last part says ``abort``, and the others go on. Any thread, any time."""
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
        """Have a part handed out: at once, or with the rest of its answer."""
        if self._whole:
            begun = self._begun.pop(part.index, None)
            part = part if begun is None else begun.extend(part)
            if part.finish_reason is None:
                self._begun[part.index] = part
                return
        self._ready.append(part)
