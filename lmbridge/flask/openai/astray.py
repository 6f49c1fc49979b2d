"""What is asked for beside the routes: a client whose base URL lacks the prefix is told the right path.

Rule: HTTP only. Beside the prefix it speaks up only where the app has no route of its own.
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
    """For what is asked for below the prefix."""
    base = _base(".chat_completions")
    listed = ", ".join(f"{base}{route}" for route in ROUTES)
    raise NotFound(f"There is no such route here; there are {listed} and {base}/models/{{id}}.")


def install(state: BlueprintSetupState) -> None:
    """Have an app that registers the blueprint answer what lacks the prefix."""

    def tell() -> Response | None:
        path = request.path.rstrip("/")
        known = path in ROUTES or path.startswith("/models/")
        if not known or not isinstance(request.routing_exception, NotFound):
            return None
        right = f"{_base(endpoint)}{path}"
        return guard.finish(error_response(NotFound(f"There is no {path} here; ask for {right}.")))

    endpoint = f"{state.name_prefix}.{state.name}.chat_completions".lstrip(".")
    assert isinstance(state.app, Flask)
    state.app.before_request(tell)


def _base(endpoint: str) -> str:
    """What stands before the routes as clients see them: the prefix, and below it whatever the app is mounted on."""
    return url_for(endpoint).removesuffix("/chat/completions")
