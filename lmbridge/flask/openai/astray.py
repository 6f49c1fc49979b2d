"""Handles unknown paths: tells a client whose base URL lacks the prefix the right path.

Rule: HTTP only. Outside the prefix, it responds only if the app has no route for the path.
"""

from __future__ import annotations

from typing import NoReturn

from flask import Flask, Response, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotFound

from lmbridge.flask.openai import guard
from lmbridge.flask.openai.errors import error_response

ROUTES = ("/chat/completions", "/completions", "/responses", "/embeddings", "/models")


def no_such_route(rest: str = "") -> NoReturn:
    """Refuse an unknown path below the prefix."""
    base = _base(".chat_completions")
    listed = ", ".join(f"{base}{route}" for route in ROUTES)
    raise NotFound(f"There is no such route; use {listed} or {base}/models/{{id}}.")


def install(state: BlueprintSetupState) -> None:
    """Make an app that registers the blueprint respond to paths that lack the prefix."""

    def tell() -> Response | None:
        path = request.path.rstrip("/")
        known = path in ROUTES or path.startswith("/models/")
        if not known or not isinstance(request.routing_exception, NotFound):
            return None
        right = f"{_base(endpoint)}{path}"
        return guard.finish(error_response(NotFound(f"There is no route {path}; use {right} instead.")))

    endpoint = f"{state.name_prefix}.{state.name}.chat_completions".lstrip(".")
    assert isinstance(state.app, Flask)
    state.app.before_request(tell)


def _base(endpoint: str) -> str:
    """The part of the routes' paths before their own names: where the app is mounted, and the prefix."""
    return url_for(endpoint).removesuffix("/chat/completions")
