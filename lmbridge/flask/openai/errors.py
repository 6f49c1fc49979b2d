"""Errors in OpenAI's envelope, as responses and as the last event of a stream.

Rule: which status and words an error has is said by ``lmbridge.flask.errors``; here is only their form.
"""

from __future__ import annotations

import json
import logging
import traceback

from flask import Response

from lmbridge.flask.errors import HttpError, http_error

logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request that is turned away before it gets near a bridge."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.message)
        self.error = error


def error_response(error: BaseException) -> Response:
    """The response to a request that failed."""
    described = describe(error)
    return Response(_envelope(described), described.status, described.headers, mimetype="application/json")


def error_payload(error: BaseException) -> str:
    """The data of an event that ends a stream which failed; its status was sent long before."""
    return _envelope(describe(error))


def describe(error: BaseException) -> HttpError:
    """What an error is over HTTP; the server's own faults are logged."""
    if isinstance(error, RefusedError):
        return error.error
    described = http_error(error)
    if described.status == 500:
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("Request %s failed: %s\n%s", getattr(error, "request_id", None) or "?", _names(error), frames)
    return described


def _names(error: BaseException | None) -> str:
    """The error and its causes by their classes. Their messages may quote the prompt, which is nobody's to log."""
    names = []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__
    return " from ".join(names)


def _envelope(error: HttpError) -> str:
    return json.dumps(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )
