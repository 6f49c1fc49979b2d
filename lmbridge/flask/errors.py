"""How an error is told over HTTP: one table for plain views, the OpenAI routes and operations.

Rule: pure functions; nothing is sent here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flask import Response, jsonify
from werkzeug.exceptions import HTTPException

from lmbridge.errors import (
    BridgeClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    ModelNotFoundError,
    PromptTooLongError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    UnsupportedOptionError,
    UnsupportedTaskError,
)

Kind = tuple[type[LMBridgeError], int, str, str | None]

# The first row that fits counts. Types and codes are those that OpenAI's clients know.
_TABLE: tuple[Kind, ...] = (
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (UnsupportedOptionError, 400, "invalid_request_error", "unsupported_parameter"),
    (UnsupportedTaskError, 400, "invalid_request_error", "unsupported_task"),
    (InvalidRequestError, 400, "invalid_request_error", None),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (RequestTimeoutError, 504, "timeout_error", "deadline_exceeded"),
    (EngineStartError, 503, "server_error", "engine_unavailable"),
    (EngineDeadError, 503, "server_error", "engine_unavailable"),
    (BridgeClosedError, 503, "server_error", "shutting_down"),
    (RequestAbortedError, 503, "server_error", "aborted"),
    (EngineError, 500, "server_error", "engine_error"),
    (LMBridgeError, 500, "server_error", None),
)

_TYPES = {403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class HttpError:
    """An error as HTTP tells it; ``type``, ``code`` and ``param`` as in OpenAI's envelope."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def http_error(error: BaseException) -> HttpError:
    """How ``error`` is told over HTTP: one of the bridge's, one of Werkzeug's, or any fault of the server."""
    if isinstance(error, LMBridgeError):
        return _of_bridge(error)
    if isinstance(error, HTTPException) and error.code is not None:
        kind = _TYPES.get(error.code, "invalid_request_error" if error.code < 500 else "server_error")
        skipped = {"content-type", "content-length"}
        headers = {name: value for name, value in error.get_headers() if name.lower() not in skipped}
        return HttpError(error.code, error.description or error.name, kind, headers=headers)
    return HttpError(500, "The server failed; its log says why.", "server_error")


def error_response(error: LMBridgeError) -> Response:
    """The bridge's error as a plain view's response: ``{"error": message, "type": class}``."""
    told = http_error(error)
    response = jsonify(error=told.message, type=type(error).__name__)
    response.status_code = told.status
    response.headers.update(told.headers)
    return response


def _of_bridge(error: LMBridgeError) -> HttpError:
    _, status, kind, code = next(row for row in _TABLE if isinstance(error, row[0]))
    if status == 500 and error.retryable:  # a fault that has passed: whoever sends it again may have an answer
        status = 503
    param = error.param if isinstance(error, InvalidRequestError) else None
    return HttpError(status, _message(error), kind, code, param, _headers(error, status))


def _message(error: LMBridgeError) -> str:
    """A prompt that is too long is told in OpenAI's words: clients know the error by them, and cut the prompt."""
    if not isinstance(error, PromptTooLongError):
        return error.message
    most = f"{error.most} tokens" if error.most else "exceeded"  # not every engine tells
    return f"This model's maximum context length is {most}. {error.message}"


def _headers(error: LMBridgeError, status: int) -> dict[str, str]:
    """When to send it again. A deadline was the client's own wish, so its library must not try once more."""
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, RequestTimeoutError):
        return {"x-should-retry": "false"}
    return {"Retry-After": "5"} if status == 503 else {}
