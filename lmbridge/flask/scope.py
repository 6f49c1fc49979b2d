"""How long an HTTP request's generations may run: not a moment longer than somebody waits for them.

Rule: a ``RequestScope`` belongs to one HTTP request, or to an app's context outside of requests. It ends with the view,
with the response that streams from it, or when the HTTP client goes away; what it has running then is aborted, and
whoever still reads that is told why.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Request, Response

from lmbridge import Client, DisconnectedError, LMBridgeError, RequestAbortedError, RequestTimeoutError
from lmbridge.errors import fresh
from lmbridge.flask.disconnect import watch
from lmbridge.flask.models import Models
from lmbridge.flask.reporting import Reporter
from lmbridge.flask.signals import disconnected, tell

_OVER = (
    "The HTTP request has ended, and what it left running was aborted. Read an answer to its end in the view, or "
    "return a response that streams it."
)
_GONE = "The HTTP client disconnected; generation was aborted."


class RequestScope:
    """The clients of one HTTP request, one for each model that it asks, and their common end.

    Args:
        app: the sender of signals.
        models: the app's.
        request: the HTTP request; None outside of requests.
    """

    def __init__(self, app: Flask, models: Models, request: Request | None) -> None:
        self.streams = False  # a response has taken it along; the request's thread only
        self._app = app
        self._models = models
        self._request = request
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}  # by model; guarded by _lock when written, as are the next two
        self._unwatch: Callable[[], None] = _nothing
        self._end: LMBridgeError | None = None  # what its readers are told once it is over

    def client(self, model: str) -> Client:
        """The client that asks this model in the request's account; made when first asked for.

        Raises:
            ModelNotFoundError: there is no model of that name.
            BridgeClosedError: the server is shutting down.
            RequestAbortedError: the request is over.
        """
        bridge = self._models.bridge(model)
        self._models.check_open()
        found = self._clients.get(model)
        if found is not None:
            return found
        if self._request is not None:
            self._models.look_at(self._request.environ)
        self._models.load(model)
        account = "application" if self._request is None else self._models.account(self._request)
        with self._lock:
            if self._end is not None:
                raise fresh(self._end)
            if not self._clients and self._request is not None:
                self._unwatch = watch(self._request.environ, self.lost)
            if model not in self._clients:
                self._clients[model] = bridge.client(account, observer=Reporter(self._app, model))
            return self._clients[model]

    def take_along(self, response: Response) -> None:
        """Go on until the response, which streams, is closed."""
        self.streams = True
        response.response = _Body(response.response, self)

    def finish(self) -> None:
        """All was sent, or there is nobody to send it: abort what still runs. The first end counts."""
        self._unwatch()
        self._close(RequestAbortedError(_OVER))  # where the client was lost, once more, for what was begun meanwhile
        self._clients.clear()

    def lost(self) -> None:
        """The HTTP client has disconnected: abort everything, and tell. The first end counts."""
        models = self._close(DisconnectedError(_GONE))
        if models:
            self._models.count_disconnect()
        for model in models:
            tell(disconnected, self._app, model=model)

    def _close(self, error: LMBridgeError) -> list[str]:
        """End the clients, and return their models; none at any but the first end."""
        with self._lock:
            models = list(self._clients) if self._end is None else []
            self._end = self._end or error
        for client in list(self._clients.values()):
            client.close(fresh(self._end))
        return models


class _Body:
    """The body of a response that streams, with which the scope ends: once it was sent, failed, or is closed.

    Servers close it in any case but one: cheroot's own gateway does not when the connection breaks at a body's end.
    """

    def __init__(self, body: Any, scope: RequestScope) -> None:
        self._body = body
        self._scope = scope
        self._parts: Iterator[Any] | None = None  # the thread that sends only, as is the next
        self._sending = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._parts is None:
            self._parts, self._sending = iter(self._body), True
        try:
            return next(self._parts)
        except DisconnectedError as error:  # servers know that one, and make no fuss
            self._end()
            raise ConnectionResetError(errno.ECONNRESET, str(error)) from error
        except RequestTimeoutError as error:  # an OSError, which servers take for a lost connection and do not log
            self._end()
            raise RuntimeError(f"A streaming response was cut off: {error}") from error
        except BaseException:  # StopIteration too
            self._end()
            raise

    def close(self) -> None:
        if self._sending:  # there was nobody for the rest
            self._scope.lost()
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._body, self._parts = (), iter(())  # a generator in it must end here, in the context it has pushed here
            self._end()

    def _end(self) -> None:
        self._sending = False
        self._scope.finish()


def _nothing() -> None:
    pass
