"""Limits the requests of an HTTP request to its lifetime: they run only while somebody waits for them.

Rule: a ``RequestScope`` belongs to one HTTP request, or outside of requests to an app context. It ends with the view,
with the response that it streams, or when the HTTP client disconnects. Its running requests are then aborted, and
their readers get an error that says why.
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
    "The HTTP request has ended, so the request that it left running was aborted. Read the whole answer in the view, "
    "or return a response that streams it."
)
_GONE = "The HTTP client disconnected; its request was aborted."


class RequestScope:
    """The clients of one HTTP request, one per model that it uses, which end together.

    Args:
        app: the sender of signals.
        models: the app's models.
        request: the HTTP request; None outside of requests.
    """

    def __init__(self, app: Flask, models: Models, request: Request | None) -> None:
        self.streams = False  # handed to a streaming response; the request's thread only
        self._app = app
        self._models = models
        self._request = request
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}  # by model; guarded by _lock when written, as are the next two
        self._unwatch: Callable[[], None] = _nothing
        self._end: LMBridgeError | None = None  # the error for its readers once it is over

    def client(self, model: str) -> Client:
        """The client of this model for the request's account; created at first use.

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
        """Last until the response, which streams, is closed."""
        self.streams = True
        response.response = _Body(response.response, self)

    def finish(self) -> None:
        """End the scope and abort its running requests. Only the first end gives the error."""
        self._unwatch()
        self._close(RequestAbortedError(_OVER))  # even after ``lost``, for requests begun meanwhile
        self._clients.clear()

    def lost(self) -> None:
        """Abort everything because the HTTP client disconnected, and send the signal. Only the first end counts."""
        models = self._close(DisconnectedError(_GONE))
        if models:
            self._models.count_disconnect()
        for model in models:
            tell(disconnected, self._app, model=model)

    def _close(self, error: LMBridgeError) -> list[str]:
        """End the clients; return their models at the first end, and none after that."""
        with self._lock:
            models = list(self._clients) if self._end is None else []
            self._end = self._end or error
        for client in list(self._clients.values()):
            client.close(fresh(self._end))
        return models


class _Body:
    """The body of a streaming response, which ends the scope once it is sent, fails, or is closed.

    Servers always close it, with one exception: cheroot's gateway does not if the connection breaks at a body's end.
    """

    def __init__(self, body: Any, scope: RequestScope) -> None:
        self._body = body
        self._scope = scope
        self._parts: Iterator[Any] | None = None  # sending thread only, as is the next
        self._sending = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._parts is None:
            self._parts, self._sending = iter(self._body), True
        try:
            return next(self._parts)
        except DisconnectedError as error:  # servers handle a ConnectionResetError quietly
            self._end()
            raise ConnectionResetError(errno.ECONNRESET, str(error)) from error
        except RequestTimeoutError as error:  # an OSError, which servers would take for a disconnect and not log
            self._end()
            raise RuntimeError(f"A streaming response was cut off: {error}") from error
        except BaseException:  # StopIteration too
            self._end()
            raise

    def close(self) -> None:
        if self._sending:  # the client left before the end
            self._scope.lost()
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._body, self._parts = (), iter(())  # a generator must end here, in the context that it pushed
            self._end()

    def _end(self) -> None:
        self._sending = False
        self._scope.finish()


def _nothing() -> None:
    pass
