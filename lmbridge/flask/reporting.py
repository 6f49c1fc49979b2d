"""What becomes of each request to a bridge, told: a span to OpenTelemetry, and a signal to whoever listens.

Rule: run by whichever thread learns of a request's begin or end; nothing is known of HTTP.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

from flask import Flask

from lmbridge import Observer, Request, RequestAbortedError, Response
from lmbridge.flask import tracing
from lmbridge.flask.signals import answered, failed, tell


class Reporter(Observer):
    """Tells of the requests to one model.

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
            outcome = RequestAbortedError("The future was cancelled.")
        tracing.end(request, outcome)
        if isinstance(outcome, Response):
            tell(answered, self._app, model=self._model, response=outcome)
        else:
            tell(failed, self._app, model=self._model, error=outcome)
