"""What happens around every view: the request's id, its key, the size and type of its body, and CORS.

Rule: HTTP only; no bridge is asked here.
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
    """Before a view: name the request, and turn away who has no key."""
    request_id()
    keys = current_models().settings.api_keys
    if keys and request.method != "OPTIONS":  # a browser's preflight carries no key
        _check_key(bearer(request.headers.get("Authorization")), keys)


def finish(response: Response) -> Response:
    """After a view, or after what became of its error."""
    response.headers[HEADER] = request_id()
    cors.allow(request, response, current_models().settings.cors_origins)
    return response


def request_id() -> str:
    """The request's id: the client's own where it is a sane one, else one of ours."""
    if "lmbridge_request_id" not in g:
        given = request.headers.get(HEADER, "")
        g.lmbridge_request_id = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
    return str(g.lmbridge_request_id)


def unique_id() -> str:
    """An id for the bridge that begins with the request's; clients may use theirs twice."""
    return f"{request_id()}-{secrets.token_hex(3)}"


def read_body(limit: int) -> bytes:
    """The request's body.

    Raises:
        UnsupportedMediaType: it is not said to be JSON. A web page of any origin may send other types to this server
            without asking the browser's leave.
        RequestEntityTooLarge: it has more than ``limit`` bytes.
    """
    if not request.is_json:
        raise UnsupportedMediaType('Send JSON, with the header "Content-Type: application/json".')
    body = request.stream.read(limit + 1) if (request.content_length or 0) <= limit else None
    if body is None or len(body) > limit:
        raise RequestEntityTooLarge(f"The request's body has more than the {limit:,} bytes that are allowed.")
    return body


# --- what is asked for by the wrong method gets its error in the blueprint's form too ---


def refuse_other_methods(blueprint: Blueprint, rule: str, endpoint: str, valid: str) -> None:
    """Have all methods of a route but one answered with 405."""

    def refuse_method(**arguments: str) -> NoReturn:
        raise MethodNotAllowed([valid], f"This route takes {valid} only.")

    refuse(blueprint, rule, endpoint, refuse_method, METHODS - {valid})


def refuse(blueprint: Blueprint, rule: str, endpoint: str, view: Callable[..., NoReturn], methods: set[str]) -> None:
    """Have requests by these methods answered by the error that ``view`` raises."""
    blueprint.add_url_rule(rule, endpoint, view, methods=methods, provide_automatic_options=False, strict_slashes=False)


def _check_key(key: str | None, keys: tuple[str, ...]) -> None:
    if key is None:
        message = 'This server wants an API key: send the header "Authorization: Bearer YOUR_KEY".'
    elif not is_known(key, keys):
        message = "The API key is not one of this server's."
    else:
        return
    headers = {"WWW-Authenticate": "Bearer"}
    raise RefusedError(HttpError(401, message, "invalid_request_error", "invalid_api_key", None, headers))
