"""The items of an answer while they grow, and the events that say so.

Rule: plain data in, plain data out. An event lacks its number only, which is the stream's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

Event = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Item:
    """One item.

    Args:
        place: its index among the answer's.
    """

    prefix: ClassVar[str]  # of the id

    def __init__(self, place: int) -> None:
        self._id = f"{self.prefix}_{secrets.token_hex(12)}"
        self._place = place
        self._pieces: list[str] = []
        self._status: ItemStatus = "in_progress"

    @property
    def object(self) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        """It is there, with nothing in it yet."""
        yield self._of_item("added")

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        """More of its text, and the log-probabilities of that."""
        raise NotImplementedError

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

    @property
    def _text(self) -> str:
        return "".join(self._pieces)

    def _of_item(self, what: str) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._place, "item": self.object}

    def _event(self, what: str, **members: Any) -> Event:
        return {"type": f"response.{what}", "item_id": self._id, "output_index": self._place, **members}


class Call(Item):
    """``function_call``. Clients know it by ``call_id``, and answer it by that."""

    prefix = "fc"

    def __init__(self, place: int, call_id: str, name: str) -> None:
        super().__init__(place)
        self._facts = {"id": self._id, "type": "function_call", "call_id": call_id, "name": name}

    @property
    def object(self) -> dict[str, Any]:
        return {**self._facts, "arguments": self._text, "status": self._status}

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        if text:
            self._pieces.append(text)
            yield self._event("function_call_arguments.delta", delta=text)

    def _whole(self) -> Iterator[Event]:
        yield self._event("function_call_arguments.done", arguments=self._text)


class TextItem(Item):
    """An item whose content is one part of text."""

    kind: ClassVar[str]  # of the part, and of its events

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._event("content_part.added", content_index=0, part=self._part)

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        self._pieces.append(text)
        yield self._of_text("delta", delta=text)

    def _whole(self) -> Iterator[Event]:
        yield self._of_text("done", text=self._text)
        yield self._event("content_part.done", content_index=0, part=self._part)

    @property
    def _part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self._text}

    @property
    def _content(self) -> list[dict[str, Any]]:
        """Of an item that begins, the part is yet to be added."""
        return [self._part] if self._pieces or self._status != "in_progress" else []

    def _of_text(self, what: str, **members: Any) -> Event:
        return self._event(f"{self.kind}.{what}", content_index=0, **members)


class Reasoning(TextItem):
    """``reasoning``, as the model thinks it; there is no summary of it."""

    prefix = "rs"
    kind = "reasoning_text"

    @property
    def object(self) -> dict[str, Any]:
        facts = {"id": self._id, "type": "reasoning", "summary": []}
        return {**facts, "content": self._content, "status": self._status}


class Message(TextItem):
    """``message``, the answer's text. Events have less to say of log-probabilities than the part has."""

    prefix = "msg"
    kind = "output_text"

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self._logprobs: list[dict[str, Any]] = []

    @property
    def object(self) -> dict[str, Any]:
        facts = {"id": self._id, "type": "message", "role": "assistant"}
        return {**facts, "content": self._content, "status": self._status}

    def grow(self, text: str, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        self._pieces.append(text)
        self._logprobs += logprobs
        yield self._of_text("delta", delta=text, logprobs=_without_bytes(logprobs))

    def _whole(self) -> Iterator[Event]:
        yield self._of_text("done", text=self._text, logprobs=_without_bytes(self._logprobs))
        yield self._event("content_part.done", content_index=0, part=self._part)

    @property
    def _part(self) -> dict[str, Any]:
        logprobs = [_with_bytes(entry) for entry in self._logprobs]
        return {"type": self.kind, "text": self._text, "annotations": [], "logprobs": logprobs}


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
