"""A conversation as in LMDeploy: pairs of prompt and answer, one turn at a time.

Rule: plain caller state, any thread; the pipeline sends the requests.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.compat.lmdeploy.prompts import as_messages
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Message

# Guards whose turn it is, and what an ending turn writes into its session. Held briefly, never while waiting;
# re-entrant, because the garbage collector may end a stream and its turns at any point.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that no longer exists may hold the old one


os.register_at_fork(after_in_child=_after_fork)


class Session:
    """One conversation; ``pipe.chat(prompt, session)`` adds a turn to it.

    Attributes:
        session_id: its number within the pipeline.
        prompt: the last prompt.
        response: the complete answer to it; None until there is one.
        history: pairs of prompt and answer; may be changed between turns.
        gen_config: for the caller's own use, as in LMDeploy.
    """

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self._turn: Turn | None = None  # the turn using the session; written under _lock, read by any thread
        self.reset()

    def update(self, **fields: Any) -> None:
        """Set ``prompt``, ``response`` or ``gen_config``."""
        for name in ("prompt", "response", "gen_config"):
            setattr(self, name, fields.get(name, getattr(self, name)))

    def reset(self) -> None:
        """Forget everything but the number, including a running turn."""
        with _lock:
            if self._turn is not None:
                self._turn.forgotten = True
            self.prompt: Any = None
            self.response: Response | None = None
            self.history: list[tuple[Any, str]] = []
            self.gen_config: Any = None

    def abort(self) -> None:
        """Stop the answer being generated or about to be, if any. Any thread."""
        turn = self._turn
        if turn is not None:
            turn.abort()

    def close(self) -> None:
        """Stop the answer being generated and forget everything."""
        self.abort()
        self.reset()

    async def async_abort(self) -> None:
        """``abort`` for a task."""
        self.abort()

    async def async_close(self) -> None:
        """``close`` for a task."""
        self.close()

    def messages(self, prompt: Any) -> list[Message]:
        """The conversation so far, and ``prompt``."""
        messages: list[Message] = []
        for asked, answered in self.history:
            messages += [*as_messages(asked), {"role": "assistant", "content": answered}]
        return messages + as_messages(prompt)

    def __repr__(self) -> str:
        return (
            f"Session(session_id={self.session_id}, history_len={len(self.history)}, "
            f"has_response={self.response is not None}, has_gen_config={self.gen_config is not None})"
        )

    def __str__(self) -> str:
        turns = "".join(f"\nUSER: \n{asked}\nASSISTANT: \n{answered}" for asked, answered in self.history)
        return f"Session(id={self.session_id}){turns and f'{chr(10)}History:{turns}{chr(10)}'}"


class Sessions:
    """A pipeline's sessions by number, while they are referenced. Any thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()  # under _lock

    def new(self) -> Session:
        """A session with a new number."""
        with _lock:
            number = next(number for number in self._numbers if number not in self._alive)
            session = self._alive[number] = Session(number)
            return session

    def find(self, given: Any) -> Any:
        """The session of that number, new if needed; anything but a number is returned unchanged."""
        if not isinstance(given, int) or isinstance(given, bool):
            return given
        with _lock:
            found = self._alive.get(given)
            if found is None:
                found = self._alive[given] = Session(given)
            return found


class Turn:
    """One request of a session, from before it is sent until its answer is read or abandoned.

    Raises:
        InvalidRequestError: it is not a session.
    """

    def __init__(self, session: Session, index: int = 0) -> None:
        if not isinstance(session, Session):
            raise InvalidRequestError(
                f"sessions must come from pipe.session(), not {type(session).__name__}; nothing was sent.", "sessions"
            )
        self._session = session
        self._index = index  # of its prompt in the list that is sent
        # Stops its answer. Weak, so that a dropped stream ends and releases the session.
        self._stop: weakref.WeakMethod[Callable[[int], None]] | None = None  # set once, under _lock
        self.forgotten = False  # the session was reset meanwhile; guarded by _lock

    @property
    def alive(self) -> bool:
        return self._stop is not None and self._stop() is not None

    def claim(self, stop: Callable[[int], None]) -> None:
        """Take the session before reading or sending anything; ``stop`` is a stream's method.

        Raises:
            InvalidRequestError: another turn has it; two at once would be missing from each other's history.
        """
        with _lock:
            other = self._session._turn
            if other is not None and other.alive:
                raise InvalidRequestError(
                    f"Session {self._session.session_id} has a request running, so this one was not sent. Read it "
                    "to the end (session.abort() ends it early) or close its stream, then try again.",
                    "session",
                )
            self._stop = weakref.WeakMethod(stop)
            self._session._turn = self

    def abort(self) -> None:
        """Stop the answer; its last part says ``abort``. Any thread, even before it is sent."""
        stop = self._stop() if self._stop is not None else None
        if stop is not None:
            stop(self._index)

    def hear(self, part: Response) -> None:
        """Called with each part that the reader gets; the last one ends the turn."""
        if part.finish_reason is None:
            return
        with _lock:
            if self._session._turn is self:
                self.remember()
                self._session._turn = None

    def remember(self) -> None:
        """Called once the answer is read to the end. Under _lock, while this turn has the session."""

    def end(self) -> None:
        """End the turn: its answer is abandoned or was never requested. Any thread, any time."""
        with _lock:
            if self._session._turn is self:
                self._session._turn = None


class ChatTurn(Turn):
    """A turn of a conversation, remembered once its answer is complete."""

    def __init__(self, session: Session, prompt: Any) -> None:
        super().__init__(session)
        self._prompt = prompt
        self._whole: Response | None = None  # reader only

    def hear(self, part: Response) -> None:
        self._whole = dataclasses.replace(part) if self._whole is None else self._whole.extend(part)
        super().hear(part)

    def remember(self) -> None:
        session, whole = self._session, self._whole
        if whole is None or self.forgotten:
            return
        session.response = whole
        if whole.finish_reason != "error":
            session.history.append((self._prompt, whole.text))
