"""The items of an answer while they grow, and the events that say so.

Rule: plain data in, plain data out. An event lacks its number only, which is the stream's. One of more text is put
together from what was serialised once an item, because at many streams its cost is paid many thousand times a second.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple


class TextDelta(NamedTuple):
    """The event of more text.

    Attributes:
        type: its type.
        head: the JSON of it, up to the text.
        text: what is new.
        tail: what follows the text, if anything does.
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
        place: its index among the answer's.
    """

    prefix: ClassVar[str]  # of the id
    texts: ClassVar[str]  # the events of its text
    index: ClassVar[dict[str, int]] = {}  # where these say that the text stands

    def __init__(self, place: int) -> None:
        self._id = f"{self.prefix}_{secrets.token_hex(12)}"
        self._place = place
        self._pieces: list[str] = []
        self._status: ItemStatus = "in_progress"
        delta = self._of_text("delta")
        self._delta: tuple[str, str] = delta["type"], f'{_compact(delta)[:-1]},"delta":'

    @property
    def object(self) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        """It is there, with nothing in it yet."""
        yield self._of_item("added")

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Event:
        """More of its text, and the log-probabilities of that."""
        self._pieces.append(text)
        return TextDelta(*self._delta, text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """There is no more of it."""
        self._status = status
        yield from self._whole()
        yield self._of_item("done")

    def cut(self) -> None:
        """It has failed before its end, if it had none yet."""
        if self._status == "in_progress":
            self._status = "incomplete"

    def _whole(self) -> Iterator[Event]:
        """What there is to say of its text once that is whole."""
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
    """``function_call``. Clients know it by ``call_id``, and answer it by that."""

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
        """Of an item that begins, the part is yet to be added."""
        return [self._part] if self._pieces or self._status != "in_progress" else []

    def _of_part(self, what: str) -> Event:
        return self._event(f"{self.part}.{what}", **self.index, part=self._part)


class Reasoning(TextItem):
    """``reasoning``, as the model thinks it."""

    prefix = "rs"
    kind = texts = "reasoning_text"

    @property
    def object(self) -> dict[str, Any]:
        facts = {"id": self._id, "type": "reasoning", "summary": []}
        return {**facts, "content": self._parts, "status": self._status}


class Summary(TextItem):
    """``reasoning`` for clients that ask for a summary, and show nothing else: the same text stands in for that."""

    prefix = "rs"
    kind = "summary_text"
    part = "reasoning_summary_part"
    texts = "reasoning_summary_text"
    index: ClassVar[dict[str, int]] = {"summary_index": 0}

    @property
    def object(self) -> dict[str, Any]:
        return {"id": self._id, "type": "reasoning", "summary": self._parts, "status": self._status}


class Message(TextItem):
    """``message``, the answer's text. Events have less to say of log-probabilities than the part has."""

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
    """The type and the JSON of a stream's event.

    Args:
        number: its place in the stream.
    """
    if isinstance(event, TextDelta):
        return event.type, f'{event.head}{json.dumps(event.text)}{event.tail},"sequence_number":{number}}}'
    return event["type"], _compact({**event, "sequence_number": number})


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Bytes are a list in this API, also where they are not known."""
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
