"""Wraps every view: the request's id, its API key, the size and type of its body, and CORS.

Rule: HTTP only; uses no bridge.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import NoReturn

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import MethodNotAllowed, RequestEntityTooLarge, UnsupportedMediaType

from lmbridge.flask.errors import HttpError
from lmbridge.flask.keys import bearer, is_known
from lmbridge.flask.models import current_models
from lmbridge.flask.openai import cors
from lmbridge.flask.openai.errors import RefusedError

HEADER = "x-request-id"
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def begin() -> None:
    """Before a view: give the request its id, and refuse it without a valid key."""
    request_id()
    keys = current_models().settings.api_keys
    if keys and request.method != "OPTIONS":  # a browser's preflight carries no key
        _check_key(bearer(request.headers.get("Authorization")), keys)


def finish(response: Response) -> Response:
    """After a view, or the handling of its error: add the headers."""
    response.headers[HEADER] = request_id()
    cors.allow(request, response, current_models().settings.cors_origins)
    return response


def request_id() -> str:
    """The request's id: the client's own if it is well-formed, else one of ours."""
    if "lmbridge_request_id" not in g:
        given = request.headers.get(HEADER, "")
        g.lmbridge_request_id = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
    return str(g.lmbridge_request_id)


def unique_id() -> str:
    """An id for the bridge that begins with the request's; unique, since clients may reuse theirs."""
    return f"{request_id()}-{secrets.token_hex(3)}"


def read_body(limit: int) -> bytes:
    """Read the request body.

    Raises:
        UnsupportedMediaType: its Content-Type is not JSON. Browsers let pages of any origin send other types without a
            preflight.
        RequestEntityTooLarge: it has more than ``limit`` bytes.
    """
    if not request.is_json:
        raise UnsupportedMediaType('Send JSON, with the header "Content-Type: application/json".')
    body = request.stream.read(limit + 1) if (request.content_length or 0) <= limit else None
    if body is None or len(body) > limit:
        raise RequestEntityTooLarge(f"The request body is too large; the limit is {limit:,} bytes.")
    return body


# --- wrong methods, whose errors have the blueprint's form too ---


def refuse_other_methods(blueprint: Blueprint, rule: str, endpoint: str, valid: str) -> None:
    """Make a route respond to all methods but one with 405."""

    def refuse_method(**arguments: str) -> NoReturn:
        raise MethodNotAllowed([valid], f"This route accepts only {valid}.")

    refuse(blueprint, rule, endpoint, refuse_method, METHODS - {valid})


def refuse(blueprint: Blueprint, rule: str, endpoint: str, view: Callable[..., NoReturn], methods: set[str]) -> None:
    """Make a route respond to these methods with the error that ``view`` raises."""
    blueprint.add_url_rule(rule, endpoint, view, methods=methods, provide_automatic_options=False, strict_slashes=False)


def _check_key(key: str | None, keys: tuple[str, ...]) -> None:
    if key is None:
        message = 'This server requires an API key; send the header "Authorization: Bearer YOUR_KEY".'
    elif not is_known(key, keys):
        message = "The API key is invalid; send one of this server's keys."
    else:
        return
    headers = {"WWW-Authenticate": "Bearer"}
    raise RefusedError(HttpError(401, message, "invalid_request_error", "invalid_api_key", None, headers))
