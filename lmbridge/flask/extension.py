"""The Flask extension.

Rule: keeps no app after ``init_app``; an app's state is in its ``Models``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flask import Flask, Request, Response

from lmbridge import Client, LMBridgeError
from lmbridge.flask.caller import end_with_requests, request_bridge
from lmbridge.flask.config import Settings
from lmbridge.flask.errors import error_response
from lmbridge.flask.hosts import HostError, check_host
from lmbridge.flask.models import EXTENSION, Models, current_models, models_of
from lmbridge.flask.sse import Reader, event_stream, first_pieces, plain_payloads
from lmbridge.flask.worker import role


class LMBridge:
    """Gives Flask apps their bridges: ``lm = LMBridge()`` and ``lm.init_app(app)``, or ``LMBridge(app)``.

    Views use ``current_bridge``, or ``lm.bridge("name")`` if the app has several models. A bridge's error that leaves a
    view becomes a response with its status: 400, 404, 429, 500, 503 or 504. Requests that a view leaves running are
    aborted when the view returns or fails, or when its client disconnects.

    Args:
        app: the app to initialise; None: call ``init_app`` later.
        account: returns the account that an HTTP request counts towards in the fair queue, such as
            ``lambda request: request.headers["X-Tenant"]``; default: the API key if keys are configured, else the
            client's address.
    """

    def __init__(self, app: Flask | None = None, *, account: Callable[[Request], str] | None = None) -> None:
        self._account = account
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read ``app.config`` and build its bridges; loads nothing yet, except with ``LMBRIDGE_PRELOAD``.

        Raises:
            RuntimeError: the app has been initialised already.
            InvalidRequestError, ModelNotFoundError, UnknownEngineError: the configuration is invalid.
        """
        if EXTENSION in app.extensions:
            raise RuntimeError(f"LMBridge is already initialised for the Flask app {app.name!r}; call init_app once.")
        models = app.extensions[EXTENSION] = Models(Settings.of(app.config), self._account)
        if models.settings.allowed_hosts:
            app.before_request(partial(check_host, models.settings.allowed_hosts))
        end_with_requests(app)
        app.register_error_handler(LMBridgeError, error_response)
        app.register_error_handler(HostError, error_response)
        if models.settings.preload and role() != "unknown":
            models.preload()

    def preload(self, app: Flask) -> None:
        """Start loading the app's models in the background, and return at once; ``/ready`` reports when they are ready.

        With ``LMBRIDGE_PRELOAD``, ``init_app`` does this under gunicorn, ``waitress-serve`` and ``flask run``. Under
        another server, or in a program of your own, call it in the process that serves.
        """
        models_of(app).preload()

    def close(self, app: Flask, *, drain: bool = False, timeout: float = 10.0) -> None:
        """Refuse new requests, and close the bridges that the app built; otherwise they close when the process exits.

        Args:
            app: the app; its context is not needed.
            drain: let pending requests finish.
            timeout: seconds for that; remaining requests are then aborted. Closing the engines may take another 10
                seconds.
        """
        models_of(app).close(drain=drain, timeout=timeout)

    def bridge(self, name: str | None = None) -> Client:
        """The bridge of the model with that name, or of the default one, as the current HTTP request sees it.

        Raises:
            ModelNotFoundError: there is no model of that name.
        """
        return request_bridge(name)

    @property
    def models(self) -> Models:
        """The current app's models with their bridges, for use outside requests."""
        return current_models()

    def stream_response(self, reader: Reader) -> Response:
        """Stream the deltas of ``reader`` as server-sent events; see docs/http/streaming.rst.

        Args:
            reader: what ``stream``, ``stream_many`` or ``Chat.stream`` returned.

        Raises:
            LMBridgeError: the request failed before anything was sent, so the response can have the error's status.
        """
        first = first_pieces(reader)
        heartbeat = current_models().settings.heartbeat
        return event_stream(reader, plain_payloads(reader, first, heartbeat))
