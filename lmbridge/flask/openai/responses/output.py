"""The growing items of an answer, and their events.

Rule: plain data in, plain data out. An event is complete but for its number in the stream. Text events are assembled
from JSON serialised once per item, because with many streams there are thousands per second.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple


class TextDelta(NamedTuple):
    """An event with more text.

    Attributes:
        type: its type.
        head: its JSON up to the text.
        text: the new text.
        tail: its JSON after the text, without the number.
    """

    type: str
    head: str
    text: str
    tail: str = ""


Event = dict[str, Any] | TextDelta
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Item:
    """One item.

    Args:
        place: its index in the answer.
    """

    prefix: ClassVar[str]  # of the id
    texts: ClassVar[str]  # the name of its text's events
    index: ClassVar[dict[str, int]] = {}  # the text's place, as these events give it

    def __init__(self, place: int) -> None:
        self._id = f"{self.prefix}_{secrets.token_hex(12)}"
        self._place = place
        self._pieces: list[str] = []
        self._status: ItemStatus = "in_progress"
        delta = self._of_text("delta")
        self._delta: tuple[str, str] = delta["type"], f'{_compact(delta)[:-1]},"delta":'

    @property
    def object(self) -> dict[str, Any]:
        """The current item."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        """The events of a new, empty item."""
        yield self._of_item("added")

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Event:
        """Add text with its log-probabilities; return the event."""
        self._pieces.append(text)
        return TextDelta(*self._delta, text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Complete the item; return the events."""
        self._status = status
        yield from self._whole()
        yield self._of_item("done")

    def cut(self) -> None:
        """Mark the item as incomplete, unless it has ended."""
        if self._status == "in_progress":
            self._status = "incomplete"

    def _whole(self) -> Iterator[Event]:
        """The events of its complete text."""
        raise NotImplementedError

    def _of_text(self, what: str, **members: Any) -> dict[str, Any]:
        return self._event(f"{self.texts}.{what}", **self.index, **members)

    @property
    def _text(self) -> str:
        return "".join(self._pieces)

    def _of_item(self, what: str) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._place, "item": self.object}

    def _event(self, what: str, **members: Any) -> dict[str, Any]:
        return {"type": f"response.{what}", "item_id": self._id, "output_index": self._place, **members}


class Call(Item):
    """``function_call``. Clients return its result under its ``call_id``."""

    prefix = "fc"
    texts = "function_call_arguments"

    def __init__(self, place: int, call_id: str, name: str) -> None:
        super().__init__(place)
        self._facts = {"id": self._id, "type": "function_call", "call_id": call_id, "name": name}

    @property
    def object(self) -> dict[str, Any]:
        return {**self._facts, "arguments": self._text, "status": self._status}

    def _whole(self) -> Iterator[Event]:
        yield self._of_text("done", arguments=self._text)


class TextItem(Item):
    """An item with one part of text."""

    kind: ClassVar[str]  # of the part
    part: ClassVar[str] = "content_part"  # the part's events
    index: ClassVar[dict[str, int]] = {"content_index": 0}

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._of_part("added")

    def _whole(self) -> Iterator[Event]:
        yield self._of_text("done", text=self._text)
        yield self._of_part("done")

    @property
    def _part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self._text}

    @property
    def _parts(self) -> list[dict[str, Any]]:
        """The parts; a new item has none yet."""
        return [self._part] if self._pieces or self._status != "in_progress" else []

    def _of_part(self, what: str) -> Event:
        return self._event(f"{self.part}.{what}", **self.index, part=self._part)


class Reasoning(TextItem):
    """``reasoning`` with the model's reasoning as its text."""

    prefix = "rs"
    kind = texts = "reasoning_text"

    @property
    def object(self) -> dict[str, Any]:
        facts = {"id": self._id, "type": "reasoning", "summary": []}
        return {**facts, "content": self._parts, "status": self._status}


class Summary(TextItem):
    """``reasoning`` for clients that ask for a summary and show only that: it contains the full text."""

    prefix = "rs"
    kind = "summary_text"
    part = "reasoning_summary_part"
    texts = "reasoning_summary_text"
    index: ClassVar[dict[str, int]] = {"summary_index": 0}

    @property
    def object(self) -> dict[str, Any]:
        return {"id": self._id, "type": "reasoning", "summary": self._parts, "status": self._status}


class Message(TextItem):
    """``message``, the answer's text. Its events have shorter log-probabilities than its part."""

    prefix = "msg"
    kind = texts = "output_text"

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self._logprobs: list[dict[str, Any]] = []

    @property
    def object(self) -> dict[str, Any]:
        facts = {"id": self._id, "type": "message", "role": "assistant"}
        return {**facts, "content": self._parts, "status": self._status}

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Event:
        self._pieces.append(text)
        self._logprobs += logprobs
        told = _compact(_without_bytes(logprobs)) if logprobs else "[]"
        return TextDelta(*self._delta, text, f',"logprobs":{told}')

    def _whole(self) -> Iterator[Event]:
        yield self._of_text("done", text=self._text, logprobs=_without_bytes(self._logprobs))
        yield self._of_part("done")

    @property
    def _part(self) -> dict[str, Any]:
        logprobs = [_with_bytes(entry) for entry in self._logprobs]
        return {"type": self.kind, "text": self._text, "annotations": [], "logprobs": logprobs}


def write_event(event: Event, number: int) -> tuple[str, str]:
    """Return an event's type and JSON.

    Args:
        number: its index in the stream.
    """
    if isinstance(event, TextDelta):
        return event.type, f'{event.head}{json.dumps(event.text)}{event.tail},"sequence_number":{number}}}'
    return event["type"], _compact({**event, "sequence_number": number})


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with lists as ``bytes``, even if unknown, as this API requires."""
    likeliest = [{**each, "bytes": each["bytes"] or []} for each in entry["top_logprobs"]]
    return {**entry, "bytes": entry["bytes"] or [], "top_logprobs": likeliest}


def _without_bytes(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top_logprobs": [{"token": each["token"], "logprob": each["logprob"]} for each in entry["top_logprobs"]],
        }
        for entry in entries
    ]
