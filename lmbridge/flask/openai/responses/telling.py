"""Turns an answer's deltas into its items, and into their events in the order that clients expect.

Rule: plain data in, plain data out; sends nothing. One item is open at a time: a delta for another item ends it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from lmbridge.flask.errors import HttpError
from lmbridge.flask.openai.logprobs import ChatLogprobs
from lmbridge.flask.openai.responses.output import Call, Event, Item, ItemStatus, Message, TextItem
from lmbridge.flask.openai.responses.writing import Form, write_error, write_usage
from lmbridge.flask.openai.thoughts import ThoughtTokens
from lmbridge.messages import Delta, FinishReason, Usage

_Key = str | int
"""Identifies an item: ``message``, ``reasoning``, or a call's index."""
_Part = tuple[_Key, Callable[[int], Item], str]
"""An item's key, a function that makes the item from its place, and some of its text."""


class Telling:
    """One answer.

    Args:
        logprobs: None if not requested.
        reasoning: the class of reasoning items; None: do not return reasoning, but count its tokens.
    """

    def __init__(self, form: Form, logprobs: ChatLogprobs | None, reasoning: type[TextItem] | None) -> None:
        self._form = form
        self._logprobs = logprobs
        self._reasoning = reasoning
        self._items: list[Item] = []
        self._open: _Key | None = None  # the last item, unless that has ended
        self._unplaced: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is still to come
        self._thoughts = ThoughtTokens()

    def begin(self) -> Iterator[Event]:
        """The first events of the answer."""
        for what in ("created", "in_progress"):
            yield {"type": f"response.{what}", "response": self._form.write("in_progress")}

    def add(self, delta: Delta) -> Iterator[Event]:
        """Add a delta; return its events."""
        self._thoughts.add(delta)
        self._place(delta)
        for key, make, text in self._parts(delta):
            if key != self._open:
                yield from self._turn_to(key, make)
            logprobs: list[dict[str, Any]] = []
            if key == "message":
                logprobs, self._unplaced = self._unplaced, []
            if text:
                yield self._items[-1].grow(text, logprobs)

    def end(self, reason: FinishReason, usage: Usage) -> Iterator[Event]:
        """End the answer, complete or cut off at its limit; the last event has its whole object.

        If the model ended without a word, the answer is an empty message.
        """
        if reason == "stop" and not any(isinstance(item, (Message, Call)) for item in self._items):
            yield from self._turn_to("message", Message)
        status: ItemStatus = "incomplete" if reason == "length" else "completed"
        yield from self._close(status)
        response = self._form.write(status, self.output, write_usage(usage, self._thoughts.count))
        yield {"type": f"response.{status}", "response": response}

    def fail(self, error: HttpError) -> Iterator[Event]:
        """End the answer with an error."""
        for item in self._items:
            item.cut()
        response = self._form.write("failed", self.output, error=write_error(error))
        yield {"type": "response.failed", "response": response}

    @property
    def output(self) -> list[dict[str, Any]]:
        """The current items."""
        return [item.object for item in self._items]

    def _parts(self, delta: Delta) -> Iterator[_Part]:
        begun = [
            piece for piece in delta.tool_calls if not piece.id
        ]  # pieces of the open call come before whatever ends it
        for piece in begun:
            yield piece.index, functools.partial(Call, call_id=piece.id, name=piece.name), piece.arguments
        if delta.reasoning and self._reasoning is not None:
            yield "reasoning", self._reasoning, delta.reasoning
        if delta.text:
            yield "message", Message, delta.text
        for piece in [piece for piece in delta.tool_calls if piece.id]:
            yield piece.index, functools.partial(Call, call_id=piece.id, name=piece.name), piece.arguments

    def _turn_to(self, key: _Key, make: Callable[[int], Item]) -> Iterator[Event]:
        """Close the open item, and open one with this key."""
        yield from self._close("completed")
        self._open = key
        self._items.append(make(len(self._items)))
        yield from self._items[-1].begin()

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield from self._items[-1].end(status)

    def _place(self, delta: Delta) -> None:
        """Keep the log-probabilities of tokens that are, or may become, a message's text."""
        if (delta.reasoning or delta.tool_calls) and not delta.text:
            self._unplaced = []
        elif self._logprobs is not None and delta.logprobs and (delta.text or self._open in (None, "message")):
            self._unplaced += self._logprobs.render(0, delta.logprobs)["content"]
