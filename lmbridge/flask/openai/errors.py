"""Writes errors in OpenAI's envelope, as responses and as the last event of a stream.

Rule: ``lmbridge.flask.errors`` decides an error's status and message; only the form is decided here.
"""

from __future__ import annotations

import json
import logging
import traceback

from flask import Response

from lmbridge.flask.errors import HttpError, http_error

logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request refused before it reaches a bridge."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.message)
        self.error = error


def error_response(error: BaseException) -> Response:
    """The error response to a failed request."""
    described = describe(error)
    return Response(_envelope(described), described.status, described.headers, mimetype="application/json")


def error_payload(error: BaseException) -> str:
    """The data of the event that ends a failed stream, whose status has already been sent."""
    return _envelope(describe(error))


def describe(error: BaseException) -> HttpError:
    """An error's HTTP form; logs errors that are the server's fault."""
    if isinstance(error, RefusedError):
        return error.error
    described = http_error(error)
    if described.status == 500:
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("Request %s failed: %s\n%s", getattr(error, "request_id", None) or "?", _names(error), frames)
    return described


def _names(error: BaseException | None) -> str:
    """The class names of the error and its causes. Messages may quote the prompt, which must not be logged."""
    names = []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__
    return " from ".join(names)


def _envelope(error: HttpError) -> str:
    return json.dumps(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )
