"""Reports the outcome of each request to a bridge: as an OpenTelemetry span and as a signal.

Rule: runs on any thread that begins or ends a request; knows nothing of HTTP.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

from flask import Flask

from lmbridge import Observer, Request, RequestAbortedError, Response
from lmbridge.flask import tracing
from lmbridge.flask.signals import answered, failed, tell


class Reporter(Observer):
    """Reports the requests to one model.

    Args:
        app: the sender of signals.
        model: the name it is served under.
    """

    def __init__(self, app: Flask, model: str) -> None:
        self._app = app
        self._model = model

    def begun(self, request: Request) -> None:
        tracing.begin(self._model, request)

    def ended(self, request: Request, outcome: Response | BaseException) -> None:
        if isinstance(outcome, CancelledError):
            outcome = RequestAbortedError("The request's future was cancelled.")
        tracing.end(request, outcome)
        if isinstance(outcome, Response):
            tell(answered, self._app, model=self._model, response=outcome)
        else:
            tell(failed, self._app, model=self._model, error=outcome)
