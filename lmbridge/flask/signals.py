"""What an app can listen to.

Rule: sent once per request to a bridge, when its outcome is known: by the view's thread, by the one that sent the
response for a stream, by the bridge's own for a future. The sender is the app. What a listener raises is logged.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace
from flask import Flask

logger = logging.getLogger(__name__)
_signals = Namespace()

answered = _signals.signal(
    "lmbridge-answered",
    "A request has its answer. Sent with ``model``, its name, and ``response``, an lmbridge.Response.",
)
failed = _signals.signal(
    "lmbridge-failed",
    "A request ended with an error. Sent with ``model``, its name, and ``error``.",
)
disconnected = _signals.signal(
    "lmbridge-disconnected",
    "An HTTP client went away before its answer was complete; its requests were aborted. Sent with ``model``. On the "
    "thread that sent the answer, or on one of lmbridge's own, without a context.",
)


def tell(signal: NamedSignal, app: Flask, **facts: Any) -> None:
    """Send a signal. A listener must not end the thread that tells it, which has others to see to."""
    try:
        signal.send(app, **facts)
    except BaseException:  # SystemExit too
        logger.exception("What listens to %s has failed.", signal.name)
