"""A conversation over any bridge or client.

Rule: knows the verbs and plain messages, nothing else. The history changes only when a turn has been answered whole.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Delta, GenerationConfig, Message, Response

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmbridge.caller.options import CallOptions
    from lmbridge.caller.verbs import Verbs


class Chat:
    """Keeps the history of one conversation; one turn at a time, and a second one meanwhile is an error.

    Attributes:
        messages: the conversation so far, as the model sees it.
    """

    def __init__(self, caller: Verbs, config: GenerationConfig | None = None, *, system: str | None = None) -> None:
        self._caller = caller
        self._config = config
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._lock = threading.Lock()  # held for a moment, to begin a turn
        self._turn: weakref.ref[_Turn] | None = None  # the last that was begun; guarded by _lock

    def ask(self, text: str, **options: Unpack[CallOptions]) -> Response:
        """Say ``text`` and block for the whole answer. Options and errors are those of ``Bridge.infer``.

        Raises:
            InvalidRequestError: another turn is not over, here and in ``stream``.
        """
        turn = self._begin(text)
        try:
            response: Response = self._caller.infer(turn.messages, self._config, **options)
            self._keep(turn, response)
        finally:
            turn.over = True
        return response

    def stream(self, text: str, **options: Unpack[CallOptions]) -> Generator[Delta, None, None]:
        """Say ``text`` and yield the answer as it grows; a turn that is left or fails is not remembered.

        Leaving the loop or ``close()`` stops the engine.
        """
        turn = self._begin(text)
        try:
            stream = self._caller.stream(turn.messages, self._config, **options)
        except BaseException:
            turn.over = True
            raise

        def deltas() -> Generator[Delta, None, None]:
            try:
                yield from stream
                self._keep(turn, stream.response)
            finally:
                turn.over = True

        return deltas()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _begin(self, text: str) -> _Turn:
        with self._lock:
            last = None if self._turn is None else self._turn()
            if last is not None and not last.over:
                raise InvalidRequestError(
                    "This chat is in the middle of a turn: read its stream to the end or close it first, and give each "
                    "thread a Chat of its own."
                )
            turn = _Turn([*self.messages, {"role": "user", "content": text}])
            self._turn = weakref.ref(turn)
            return turn

    def _keep(self, turn: _Turn, response: Response) -> None:
        if response.finish_reason != "abort":
            self.messages = [*turn.messages, {"role": "assistant", "content": response.text}]


class _Turn:
    """What the model sees in one turn. It is over when it was answered or left, or when nobody holds it any more."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.over = False  # written by whoever reads the answer
