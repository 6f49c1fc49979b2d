"""The app that ``lmbridge serve`` serves, and what stands around it: a bounded number of places, and the access log.

Rule: Flask and WSGI only; it runs under any server. Everything here could stand in an app of one's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flask import Flask, request
from werkzeug.wsgi import ClosingIterator

from lmbridge.errors import QueueFullError
from lmbridge.flask import LMBridge, openai, operations, playground, rerank

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

access = logging.getLogger("lmbridge.access")

_CROWDED = "lmbridge.crowded"  # in the WSGI environment of a request for which there is no place


def create_app(config: Mapping[str, Any], *, page: bool = True) -> Flask:
    """An app with the OpenAI-compatible API, the reranking routes, the operations and the page.

    Args:
        config: ``LMBRIDGE_*`` keys.
        page: serve the page at ``/`` too.

    Raises:
        LMBridgeError: a key's value is invalid, or the model does not exist.
    """
    app = Flask(__name__)
    app.config.update(config)
    LMBridge(app)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(rerank.blueprint)
    app.register_blueprint(operations.blueprint)
    if page:
        app.register_blueprint(playground.blueprint)

    @app.before_request
    def refuse_in_a_crowd() -> None:
        if _CROWDED in request.environ:
            raise QueueFullError("The server is at capacity; try again later.")

    return app


class Front:
    """Counts the requests that are inside the app until their response is sent, and marks those that are too many.

    Marked ones are refused by the app, so that their errors have the form of its others. Probes, metrics and the page
    need no place: with threads to spare, they are answered however many streams there are.

    Args:
        app: what serves them.
        places: for how many there is room.
    """

    def __init__(self, app: WSGIApplication, places: int) -> None:
        self._app = app
        self._places = places
        self._inside = 0  # guarded by the condition's lock
        self._changed = threading.Condition()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "POST" or environ["PATH_INFO"].startswith("/admin/"):
            return self._app(environ, start_response)
        with self._changed:
            self._inside += 1
            if self._inside > self._places:
                environ[_CROWDED] = True
        try:
            return ClosingIterator(self._app(environ, start_response), self._leave)
        except BaseException:
            self._leave()
            raise

    @property
    def inside(self) -> int:
        return self._inside

    def wait_until_empty(self, timeout: float) -> bool:
        """Whether everybody has left within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside, timeout)

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()


class AccessLog:
    """Logs one line a response to the logger ``lmbridge.access``: who, what, its status, and how long it took."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        began, status = time.monotonic(), "-"

        def start(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status
            status = line.partition(" ")[0]
            return start_response(line, headers, exc_info)

        def log() -> None:
            sent = (environ.get("REMOTE_ADDR", "-"), environ["REQUEST_METHOD"], environ["PATH_INFO"])
            who, method, path = (quote(text, safe="/:", encoding="latin-1") for text in sent)  # without line ends
            access.info("%s %s %s %s %.3f s", who, method, path, status, time.monotonic() - began)

        return ClosingIterator(self._app(environ, start), log)
