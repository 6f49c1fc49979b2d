"""Gives each HTTP request its view of the bridges, and ends that view with the request.

Rule: runs on the request's thread, in Flask's contexts. Each request has one scope; ``scope`` says what it does.
"""

from __future__ import annotations

from typing import Any, cast

from flask import Flask, Request, Response, current_app, g, has_app_context, has_request_context, request
from flask.signals import got_request_exception, request_finished
from werkzeug.local import LocalProxy

from lmbridge import Client
from lmbridge.flask.models import current_models
from lmbridge.flask.scope import RequestScope

_Scopes = dict[Request | None, RequestScope]  # by HTTP request; a test's requests may share an app's context


def request_bridge(name: str | None = None) -> Client:
    """The bridge of that name, or the default one, as the current HTTP request sees it.

    Raises:
        ModelNotFoundError: there is no model of that name.
        BridgeClosedError: the server is shutting down.
        RuntimeError: there is no current app, or it has no lmbridge.
    """
    if not has_app_context():
        raise RuntimeError(
            "current_bridge was used outside a request and an app context. For a streaming response, start the stream "
            "in the view and read it in the generator, or wrap the generator in flask.stream_with_context. Elsewhere, "
            "use `with app.app_context():`."
        )
    models = current_models()
    return _scope().client(models.default if name is None else name)


current_bridge = cast(Client, LocalProxy(request_bridge))
"""The default model's bridge as the current HTTP request sees it: ``current_bridge.infer(prompt)`` in any view."""


def end_with_requests(app: Flask) -> None:
    """Connect to the app's signals that end its scopes."""
    request_finished.connect(_end_or_take_along, app)
    got_request_exception.connect(_end_failed, app)
    app.teardown_appcontext(_end_left)


def _end_or_take_along(_: Flask, response: Response, **more: Any) -> None:
    """Hand the scope to a response that streams; otherwise the request is over, so end the scope."""
    if not _streams(response):
        _end_scope()
    elif not response.direct_passthrough or _current_request() in g.get("_lmbridge", {}):
        # Even if no bridge was used yet: a generator with the request's context may use one while it streams. Except
        # for passed-through files, which servers can send by themselves only if nobody wraps them.
        _scope().take_along(response)


def _end_failed(_: Flask, **more: Any) -> None:
    """End the scope after the view, or code that runs after it, has failed: no response of its own is sent."""
    _end_scope()


def _end_left(_: BaseException | None = None) -> None:
    """End the scopes left in an app context that ends, except those handed to a response."""
    scopes: _Scopes = g.get("_lmbridge", {})
    for current, scope in list(scopes.items()):
        if not scope.streams:
            scopes.pop(current, None)
            scope.finish()


def _scope() -> RequestScope:
    """The scope of the current request, or outside of requests that of the app context."""
    current = _current_request()
    app = cast(Any, current_app)._get_current_object()
    scopes: _Scopes = g.setdefault("_lmbridge", {})  # one atomic step, as is the next: threads may share a context
    return scopes.setdefault(current, RequestScope(app, current_models(), current))


def _end_scope() -> None:
    scope = g.get("_lmbridge", {}).pop(_current_request(), None)
    if scope is not None:
        scope.finish()


def _current_request() -> Request | None:
    return cast(Any, request)._get_current_object() if has_request_context() else None


def _streams(response: Response) -> bool:
    """Whether the body is generated while it is sent; HEAD requests and some statuses have no body."""
    status = response.status_code
    return not (response.is_sequence or request.method == "HEAD" or status < 200 or status in (204, 304))
