"""Parses an answer as it arrives into thoughts, text and function calls.

Rule: server thread only; one ``Reader`` per answer. transformers' parser finds the regions of the text; even if it
fails on a text, the text reaches the caller.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines.dialect.formats import Format
from lmbridge.log import logger
from lmbridge.messages import Delta, ToolCall

_CALLS, _TEXT = "tool_calls", "content"
_ID_LENGTH = 24
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_LONGEST_HEAD = 1_000  # characters


@dataclass(slots=True)
class Said:
    """What is new in an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Reader:
    """Parses one answer.

    Args:
        parser: transformers' ``ResponseParser``, which has seen the prompt.
        format: the format of calls; None for the tokenizer's own.

    Attributes:
        called: how many calls have begun.
        whole: the last of them has also ended.
    """

    def __init__(self, parser: Any, format: Format | None) -> None:
        self._parser: Any = parser
        self._format = format
        self._open: _Region | None = None
        self._ended = False  # the open region was not closed by the model
        self._bare = False  # no text since the answer or another region began
        self.called = 0
        self.whole = True

    def push(self, text: str) -> Said:
        """Parse the next piece of text."""
        said = Said()
        step = len(text) if self._format is not None else 1  # a tokenizer's own template may fail at any character
        for start in range(0, len(text), step or 1):
            piece = text[start : start + step]
            if self._parser is None:
                said.text += piece
                continue
            try:
                self._take(self._parser.feed(piece), said)
            except Exception as cause:
                self._give_up(cause, said, piece if step > 1 else "")
        return said

    def finish(self) -> Said:
        """Parse the rest of an ended answer."""
        said = Said()
        self._ended = True
        if self._parser is not None:
            try:
                self._take(self._parser.finalize()[1], said)
            except Exception as cause:
                self._give_up(cause, said)
        return said

    def _give_up(self, cause: Exception, said: Said, last: str = "") -> None:
        """From now on everything is text, including what could not be parsed."""
        logger.warning("An answer could not be parsed any further: %s", cause)
        self._parser = None
        if self._open is not None and not self._open.name:
            self._ended = self._ended or bool(last)
            said.text += self._unread(self._open.body) + last

    def _take(self, events: Iterable[dict[str, Any]], said: Said) -> None:
        for event in events:
            kind, name = event["type"], event["field"]
            if name == _CALLS:
                self._of_call(kind, event, said)
            elif kind == "region_close":
                self._bare = True
            elif kind == "region_chunk" and name in (_TEXT, "closing"):
                said.text += self._opened(event["text"])
            elif kind == "region_chunk" and name in ("reasoning_content", "thinking", "reasoning"):
                said.reasoning += event["text"]

    def _opened(self, text: str) -> str:
        """The text without the blank lines that separate it from the previous region."""
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text

    def _of_call(self, kind: str, event: dict[str, Any], said: Said) -> None:
        if kind == "region_open":
            self._open = _Region(self.called)
        elif self._open is not None and kind == "region_chunk":
            said.calls += self._begun(self._open.push(event["text"]))
        elif self._open is not None:
            region, self._open, self._bare = self._open, None, True
            self.whole = region.over or not region.name
            if region.name:
                return
            calls = [] if self._is_cut() else _calls(event["value"], self._is_marked())
            if not calls:
                said.text += self._unread(region.body, event["value"])
            for name, arguments in calls:
                said.calls += self._begun([ToolCall(self.called, "", name, arguments)])

    def _is_marked(self) -> bool:
        return self._format is None or self._format.around[0] != ""

    def _is_cut(self) -> bool:
        """Whether a call may be incomplete: JSON shows its own end, other formats do not."""
        return self._ended and self._format is not None and self._format.spelled is None

    def _begun(self, pieces: list[ToolCall]) -> list[ToolCall]:
        for piece in pieces:
            if piece.name:
                piece.id = self._id()
                self.called += 1
        return pieces

    def _unread(self, body: str, value: Any = None) -> str:
        """A region that is not a call, as written, except for blanks around its marks."""
        begin, end = ("", "") if self._format is None else self._format.around
        found = value.get("function", value) if isinstance(value, dict) else {}
        begin = begin.replace("{name}", str(found.get("name", "")))
        self._bare = False
        return f"{begin}{body}" if self._ended else f"{begin}{body}{end}"

    def _id(self) -> str:
        length = self._format.id_length if self._format is not None else 0
        return secrets.token_hex(length)[:length] if length else f"call_{secrets.token_hex(_ID_LENGTH // 2)}"


def read_apart(reader: Reader, delta: Delta) -> None:
    """Replace a delta's text by the reader's parse of it."""
    said = reader.push(delta.text)
    delta.text, delta.reasoning, delta.tool_calls = said.text, said.reasoning, tuple(said.calls)
    if delta.finish_reason is not None:
        rest = reader.finish()
        delta.text += rest.text
        delta.reasoning += rest.reasoning
        delta.tool_calls = (*said.calls, *rest.calls)
        if delta.finish_reason == "stop" and reader.called and reader.whole:
            delta.finish_reason = "tool_calls"


class _Region:
    """One region of calls. The arguments of ``{"name": …, "arguments": {…}}`` are passed on as they arrive."""

    def __init__(self, index: int) -> None:
        self.body = ""
        self.name = ""
        self._index = index
        self._from = 0  # where the unread part of the body starts
        self._depth = 0  # of braces and brackets; the arguments end when it returns to 0
        self._quoted = self._escaped = self.over = False

    def push(self, text: str) -> list[ToolCall]:
        self.body += text
        pieces = []
        if not self.name and len(self.body) < _LONGEST_HEAD and (head := _HEAD.match(self.body)):
            self.name, self._from = head[1], head.end()
            pieces.append(ToolCall(self._index, "", self.name))
        if self.name and not self.over:
            arguments = self._arguments()
            if arguments:
                pieces.append(ToolCall(self._index, arguments=arguments))
        return pieces

    def _arguments(self) -> str:
        """The new part of the arguments."""
        start = self._from
        for character in self.body[start:]:
            self._from += 1
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self.over = True
                    break
        return self.body[start : self._from]


def _calls(value: Any, marked: bool) -> list[tuple[str, str]]:
    """Names and arguments in the parser's result for a region; none if it is not a call.

    Args:
        marked: a call was announced, so it may omit its arguments.
    """
    found = value.get("call", value) if isinstance(value, dict) else value
    listed = found if isinstance(found, list) else [found]
    calls = [_call(each.get("function", each) if isinstance(each, dict) else each, marked) for each in listed]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(value: Any, marked: bool) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {} if marked else None))
    if isinstance(arguments, str):  # JSON inside JSON, or plain text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return value["name"], json.dumps(arguments, ensure_ascii=False)
