"""A conversation over any bridge or client.

Rule: knows the verbs and plain messages, nothing else. The history changes only when a turn has been answered whole.
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

        With ``tools``, Python functions, those that the model calls are run here, on this thread, and their results
        are told to the model until it answers: ``chat.ask("Will it rain in Paris?", tools=[weather])``. Results are
        told as they are if they are strings, else as JSON. A ``tool_choice`` that forces a call forces the first
        round only, and after its results the model answers; after ``MOST_ROUNDS`` rounds it has to. ``timeout`` holds
        for all rounds and for what the functions take between them.

        Raises:
            InvalidRequestError: another turn is not over, here and in ``stream``; or a tool is no function.
            Exception: what a function raises. The turn is not remembered then.
        """
        turn = self._begin(text)
        try:
            rounds = Rounds(turn.messages, self._config, options)
            while not rounds.over:
                rounds.take(self._caller.infer(rounds.messages, self._config, **rounds.options))
            self._keep(rounds)
        finally:
            turn.over = True
        return rounds.response

    def stream(self, text: str, **options: Unpack[CallOptions]) -> ChatStream:
        """Say ``text`` and return the answer as it grows; a turn that is left or fails is not remembered.

        Leaving the loop or ``close()`` stops the engine. With ``tools`` the deltas of all rounds come one after
        another; those with ``tool_calls`` say what is called, and the functions run where the next delta is asked for.
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
                    "This chat is in the middle of a turn: read its stream to the end or close it first, and give each "
                    "thread a Chat of its own."
                )
            turn = _Turn([*self.messages, {"role": "user", "content": text}])
            self._turn = weakref.ref(turn)
            return turn

    def _keep(self, rounds: Rounds) -> None:
        if rounds.response.finish_reason != "abort":
            self.messages = rounds.messages


class ChatStream:
    """The deltas of one turn, read by one thread: ``for delta in chat.stream(…)``. Leaving it stops the engine.

    One that nobody holds any more needs no finalizer: its stream has one, and its turn is over then.
    """

    def __init__(self, chat: Chat, turn: _Turn, rounds: Rounds) -> None:
        self._chat, self._turn, self._rounds = chat, turn, rounds
        self._stream = self._ask()

    @property
    def response(self) -> Response:
        """The turn's answer, once it is over; until then that of the round under way, as far as it has come."""
        return self._rounds.response if self._rounds.over else self._stream.response

    def wait(self, timeout: float | None = None) -> bool:
        """As ``Stream.wait``: whether ``next`` has something at once. It may be the end of a round, whose functions run
        then.
        """
        return self._turn.over or self._stream.wait(timeout)

    def close(self) -> None:
        """Stop the engine, and forget the turn unless it was answered."""
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
        except StopIteration as stray:  # of a function; it would look like the end of the answer
            raise RuntimeError("A function of the chat raised StopIteration.") from stray

    def _ask(self) -> Stream:
        rounds, chat = self._rounds, self._chat
        return chat._caller.stream(rounds.messages, chat._config, **rounds.options)


class _Turn:
    """What the model sees in one turn. It is over when it was answered or left, or when nobody holds it any more."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.over = False  # written by whoever reads the answer
