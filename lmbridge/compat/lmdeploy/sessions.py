"""A conversation as LMDeploy keeps it: pairs of what was said and what was answered.

Rule: plain state of the caller's, one turn at a time; the pipeline does the asking.
"""

from __future__ import annotations

import weakref
from typing import Any

from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.compat.lmdeploy.prompts import as_messages
from lmbridge.compat.lmdeploy.streaming import ResponseStream
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Message


class Session:
    """One conversation; ``pipe.chat(prompt, session)`` adds a turn to it.

    Attributes:
        session_id: its number within the pipeline.
        prompt: what was asked last.
        response: the whole answer to it; None while it is missing.
        history: pairs of prompt and answer; may be changed between turns.
        gen_config: for the caller's own use, as in LMDeploy.
    """

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.gen_config: Any = None
        # What is being read in its name, and where in it; weak, so that a stream that is dropped ends.
        self._running: tuple[weakref.ref[ResponseStream], int] | None = None
        self.reset()

    def update(self, **fields: Any) -> None:
        """Set ``prompt``, ``response`` or ``gen_config``."""
        for name in ("prompt", "response", "gen_config"):
            setattr(self, name, fields.get(name, getattr(self, name)))

    def reset(self) -> None:
        """Forget everything but the number."""
        self.prompt: Any = None
        self.response: Response | None = None
        self.history: list[tuple[Any, str]] = []
        self.gen_config = None

    def abort(self) -> None:
        """Stop the answer that is being generated, if one is; any thread."""
        running = self._running
        stream = running[0]() if running is not None else None
        if running is not None and stream is not None:
            stream.stop(running[1])

    def close(self) -> None:
        """Stop the answer that is being generated and forget everything."""
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

    def check_idle(self) -> None:
        """Raise InvalidRequestError while a turn runs: two at once would each miss the other in the history."""
        if self._running is not None and self._running[0]() is not None:
            raise InvalidRequestError(
                f"Session {self.session_id} has a request running; wait for it, or abort() it.", "session"
            )

    def begin(self, stream: ResponseStream, index: int = 0) -> None:
        """Remember what is being read in this session's name."""
        self._running = (weakref.ref(stream), index)

    def end(self) -> None:
        """Nothing is being read any more."""
        self._running = None

    def __repr__(self) -> str:
        return (
            f"Session(session_id={self.session_id}, history_len={len(self.history)}, "
            f"has_response={self.response is not None}, has_gen_config={self.gen_config is not None})"
        )

    def __str__(self) -> str:
        turns = "".join(f"\nUSER: \n{asked}\nASSISTANT: \n{answered}" for asked, answered in self.history)
        return f"Session(id={self.session_id}){turns and f'{chr(10)}History:{turns}{chr(10)}'}"
