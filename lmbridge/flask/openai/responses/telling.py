"""An answer's deltas made into its items, and into the events that tell of them in the order that clients expect.

Rule: plain data in, plain data out; nothing is asked or sent here. One item is open at a time: what belongs to another
one ends it.
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
"""Which item something belongs to: ``message``, ``reasoning``, or a call's index."""
_Part = tuple[_Key, Callable[[int], Item], str]
"""Some text of an item, and how to make that one of its place where it has not begun."""


class Telling:
    """One answer.

    Args:
        logprobs: None where none were asked for.
        reasoning: the kind of item that tells what the model thinks, or None where nobody is told; its tokens are
            counted in any case.
    """

    def __init__(self, form: Form, logprobs: ChatLogprobs | None, reasoning: type[TextItem] | None) -> None:
        self._form = form
        self._logprobs = logprobs
        self._reasoning = reasoning
        self._items: list[Item] = []
        self._open: _Key | None = None  # the last item, unless that has ended
        self._unplaced: list[dict[str, Any]] = []  # log-probabilities of tokens that have shown no text yet
        self._thoughts = ThoughtTokens()

    def begin(self) -> Iterator[Event]:
        """The answer is begun."""
        for what in ("created", "in_progress"):
            yield {"type": f"response.{what}", "response": self._form.write("in_progress")}

    def add(self, delta: Delta) -> Iterator[Event]:
        """What a delta adds."""
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
        """The answer is whole, or as long as it may be; the last event has the object that it is.

        A model that has ended its answer without a word has said nothing, which is a message too.
        """
        if reason == "stop" and not any(isinstance(item, (Message, Call)) for item in self._items):
            yield from self._turn_to("message", Message)
        status: ItemStatus = "incomplete" if reason == "length" else "completed"
        yield from self._close(status)
        response = self._form.write(status, self.output, write_usage(usage, self._thoughts.count))
        yield {"type": f"response.{status}", "response": response}

    def fail(self, error: HttpError) -> Iterator[Event]:
        """There is no more of the answer than was told."""
        for item in self._items:
            item.cut()
        response = self._form.write("failed", self.output, error=write_error(error))
        yield {"type": "response.failed", "response": response}

    @property
    def output(self) -> list[dict[str, Any]]:
        """The items as they are now."""
        return [item.object for item in self._items]

    def _parts(self, delta: Delta) -> Iterator[_Part]:
        begun = [
            piece for piece in delta.tool_calls if not piece.id
        ]  # the rest of what is open comes before what ends it
        for piece in begun:
            yield piece.index, functools.partial(Call, call_id=piece.id, name=piece.name), piece.arguments
        if delta.reasoning and self._reasoning is not None:
            yield "reasoning", self._reasoning, delta.reasoning
        if delta.text:
            yield "message", Message, delta.text
        for piece in [piece for piece in delta.tool_calls if piece.id]:
            yield piece.index, functools.partial(Call, call_id=piece.id, name=piece.name), piece.arguments

    def _turn_to(self, key: _Key, make: Callable[[int], Item]) -> Iterator[Event]:
        """Have an item with this key be the open one."""
        yield from self._close("completed")
        self._open = key
        self._items.append(make(len(self._items)))
        yield from self._items[-1].begin()

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield from self._items[-1].end(status)

    def _place(self, delta: Delta) -> None:
        """Keep the log-probabilities of what is, or may become, a message's text."""
        if (delta.reasoning or delta.tool_calls) and not delta.text:
            self._unplaced = []
        elif self._logprobs is not None and delta.logprobs and (delta.text or self._open in (None, "message")):
            self._unplaced += self._logprobs.render(0, delta.logprobs)["content"]
