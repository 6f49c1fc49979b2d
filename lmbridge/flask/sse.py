"""Server-sent events: an answer that streams, as an HTTP response.

Rule: the response owns what it reads from: the reader is closed with it. What else ends then is ``scope``'s business.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flask import Response

from lmbridge import ChatStream, Delta, LMBridgeError, RequestAbortedError, Stream, StreamGroup, Usage

Reader = Stream | StreamGroup | ChatStream
Piece = tuple[int, Delta]
"""Which answer, and what it has new."""
Payload = str | tuple[str, str]
"""The data of an event, or its type and its data."""

FIRST_WAIT = 0.25  # seconds for which headers wait for the first token, so that an error before it has its own status
_OPEN = b": open\n\n"  # headers leave with the first bytes, before the prompt is worked on
_PING = b": ping\n\n"
_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def pieces(reader: Reader, heartbeat: float) -> Iterator[Piece | None]:
    """What ``reader`` has, as it comes; None after ``heartbeat`` seconds of silence. Raises what a stream raises."""
    while True:
        if not reader.wait(heartbeat):
            yield None
            continue
        try:
            piece = next(reader)
        except StopIteration:
            return
        yield piece if isinstance(piece, tuple) else (0, piece)


def first_pieces(reader: Reader) -> list[Piece | None]:
    """What comes within FIRST_WAIT, if anything does; raises the error of a request that fails as early as that."""
    if not reader.wait(FIRST_WAIT):
        return []
    first = list(itertools.islice(pieces(reader, FIRST_WAIT), 1))
    for _, delta in [piece for piece in first if piece is not None]:
        if delta.error is not None:
            raise delta.error
    return first


def event_stream(reader: Reader, payloads: Iterator[Payload | None]) -> Response:
    """The response that sends each payload as an event, and a comment for None.

    Args:
        reader: closed with the response.
        payloads: the events; they are asked for while the response is sent, without a request context.
    """
    return Response(_frames(reader, payloads), mimetype="text/event-stream", headers=_HEADERS)


def _frames(reader: Reader, payloads: Iterator[Payload | None]) -> Iterator[bytes]:
    with reader:
        yield _OPEN
        for payload in payloads:
            yield _PING if payload is None else _frame(payload)


def _frame(payload: Payload) -> bytes:
    if isinstance(payload, str):
        return b"data: " + payload.encode() + b"\n\n"
    kind, data = payload
    return f"event: {kind}\ndata: {data}\n\n".encode()


def plain_payloads(reader: Reader, first: list[Piece | None], heartbeat: float) -> Iterator[str | None]:
    """The events of ``LMBridge.stream_response``: texts, then how it ended.

    ``{"reasoning": "…"}``, ``{"text": "…"}`` and ``{"tool_calls": [{"index", "id", "name", "arguments"}]}``, whose
    pieces join as those of a Delta, as they come, with ``"index"`` where several answers are streamed; at the end of
    each ``{"finish_reason": "…", "usage": {…}}``, or ``{"error": "…", "type": "…"}``.
    """
    many = isinstance(reader, StreamGroup)
    try:
        for piece in itertools.chain(first, pieces(reader, heartbeat)):
            if piece is None:
                yield None
                continue
            index, delta = piece
            for event in _events(delta):
                yield json.dumps({"index": index, **event} if many else event)
        if not isinstance(reader, StreamGroup) and reader.response.finish_reason == "abort":
            yield json.dumps(_error(RequestAbortedError("The stream was closed before its answer was complete.")))
    except LMBridgeError as error:
        yield json.dumps(_error(error))


def _events(delta: Delta) -> Iterator[dict[str, Any]]:
    if delta.reasoning:
        yield {"reasoning": delta.reasoning}
    if delta.text:
        yield {"text": delta.text}
    if delta.tool_calls:
        yield {"tool_calls": [asdict(call) for call in delta.tool_calls]}
    if delta.error is not None:
        yield _error(delta.error)
    elif delta.finish_reason is not None:
        counts = {} if delta.usage is None else {"usage": usage_object(delta.usage)}
        yield {"finish_reason": delta.finish_reason, **counts}


def usage_object(usage: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
    """Token counts as JSON has them; of reasoning where there was any."""
    details = {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}} if reasoning_tokens else {}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        **details,
    }


def _error(error: BaseException) -> dict[str, str]:
    text = error.message if isinstance(error, LMBridgeError) else str(error)
    return {"error": text, "type": type(error).__name__}
