"""A conversation over any bridge or client.

Rule: knows the verbs and plain messages, nothing else. The history changes only once a turn has a complete answer.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Delta, GenerationConfig, Message, Response
from lmbridge.rounds import Rounds

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmbridge.caller.options import CallOptions
    from lmbridge.caller.streams import Stream
    from lmbridge.caller.verbs import Verbs


class Chat:
    """Keeps the history of one conversation; one turn at a time; starting a second one raises.

    Attributes:
        messages: the conversation so far, as the model sees it.
    """

    def __init__(self, caller: Verbs, config: GenerationConfig | None = None, *, system: str | None = None) -> None:
        self._caller = caller
        self._config = config
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._lock = threading.Lock()  # held for a moment, to begin a turn
        self._turn: weakref.ref[_Turn] | None = None  # the latest; guarded by _lock

    def ask(self, text: str, **options: Unpack[CallOptions]) -> Response:
        """Say ``text`` and block for the complete answer. Options and errors are those of ``Bridge.infer``.

        With Python functions as ``tools``, the ones the model calls run here, on this thread, and the model gets their
        results until it answers: ``chat.ask("Will it rain in Paris?", tools=[weather])``. A string result is passed as
        it is, anything else as JSON. A ``tool_choice`` that forces a call applies to the first round only; after
        ``MOST_ROUNDS`` rounds the model must answer. ``timeout`` covers all rounds and the functions between them.

        Raises:
            InvalidRequestError: another ``ask`` or ``stream`` is not over yet, or a tool is not a function.
            Exception: whatever a function raises; the turn is then forgotten.
        """
        turn = self._begin(text)
        try:
            rounds = Rounds(turn.messages, self._config, options)
            while True:  # Python 3.12 and 3.13 keep the backward jump of `while not rounds.over` outside the try
                if rounds.over:
                    break
                rounds.take(self._caller.infer(rounds.messages, self._config, **rounds.options))
            self._keep(rounds)
        finally:
            turn.over = True
        return rounds.response

    def stream(self, text: str, **options: Unpack[CallOptions]) -> ChatStream:
        """Say ``text`` and return the answer as it grows; a turn that fails or is abandoned is forgotten.

        Leaving the loop or calling ``close()`` stops generation. With ``tools``, the deltas of all rounds come one
        after another; those with ``tool_calls`` show the calls, and the functions run when the next delta is requested.
        """
        turn = self._begin(text)
        try:
            return ChatStream(self, turn, Rounds(turn.messages, self._config, options))
        except BaseException:
            turn.over = True
            raise

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _begin(self, text: str) -> _Turn:
        with self._lock:
            last = None if self._turn is None else self._turn()
            if last is not None and not last.over:
                raise InvalidRequestError(
                    "This chat is in the middle of a turn: read its stream to the end or close it first. Give each "
                    "thread its own Chat."
                )
            turn = _Turn([*self.messages, {"role": "user", "content": text}])
            self._turn = weakref.ref(turn)
            return turn

    def _keep(self, rounds: Rounds) -> None:
        if rounds.response.finish_reason != "abort":
            self.messages = rounds.messages


class ChatStream:
    """The deltas of one turn, read by one thread: ``for delta in chat.stream(…)``. Leaving the loop stops generation.

    It needs no finalizer: the underlying stream has one, and the turn ends with it.
    """

    def __init__(self, chat: Chat, turn: _Turn, rounds: Rounds) -> None:
        self._chat, self._turn, self._rounds = chat, turn, rounds
        self._stream = self._ask()

    @property
    def response(self) -> Response:
        """The turn's answer once it is over; before, the current round's answer so far."""
        return self._rounds.response if self._rounds.over else self._stream.response

    def wait(self, timeout: float | None = None) -> bool:
        """As ``Stream.wait``: whether ``next`` can proceed at once. At the end of a round it then runs functions."""
        return self._turn.over or self._stream.wait(timeout)

    def close(self) -> None:
        """Stop generation, and forget the turn unless it is complete."""
        self._turn.over = True
        self._stream.close()

    def __iter__(self) -> ChatStream:
        return self

    def __next__(self) -> Delta:
        if self._turn.over:
            raise StopIteration
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _next(self) -> Delta:
        while True:
            try:
                return next(self._stream)
            except StopIteration:
                pass
            self._take(self._stream.response)
            if self._rounds.over:
                self._chat._keep(self._rounds)
                raise StopIteration
            self._stream = self._ask()

    def _take(self, response: Response) -> None:
        try:
            self._rounds.take(response)
        except StopIteration as stray:  # from a function; it would look like the end of the answer
            raise RuntimeError("A tool function raised StopIteration.") from stray

    def _ask(self) -> Stream:
        rounds, chat = self._rounds, self._chat
        return chat._caller.stream(rounds.messages, chat._config, **rounds.options)


class _Turn:
    """What the model sees in one turn, which is over once it is answered, abandoned or garbage-collected."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.over = False  # written by the thread that reads the answer
