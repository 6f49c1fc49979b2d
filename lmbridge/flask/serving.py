"""The app of ``lmbridge serve``, and its WSGI middleware: a limit on concurrent requests, and the access log.

Rule: Flask and WSGI only; runs under any server. Other apps may use everything here.
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

_CROWDED = "lmbridge.crowded"  # marks a request over the limit, in its WSGI environment


def create_app(config: Mapping[str, Any], *, page: bool = True) -> Flask:
    """Create an app with the OpenAI-compatible API, the reranking and operations routes, and the web page.

    Args:
        config: ``LMBRIDGE_*`` keys.
        page: serve the web page at ``/``.

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
    """Counts the requests inside the app until their response is sent, and marks those over a limit.

    The app refuses marked requests, so that these errors have the same form as its others. Probes, metrics and the web
    page do not count: spare threads serve them, however many streams there are.

    Args:
        app: the app.
        places: the limit.
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
        """Wait until no request is inside; return False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._inside, timeout)

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()


class AccessLog:
    """Logs each response to the logger ``lmbridge.access``: client, method, path, status and duration."""

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
