"""The signals that an app can listen to.

Rule: sent once per request to a bridge, when its outcome is known: on the view's thread; for a stream, on the thread
that sends the response; for a future, on the bridge's own. The sender is the app. Errors of listeners are logged.
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
    "A request succeeded. Sent with ``model``, its name, and ``response``, an lmbridge.Response.",
)
failed = _signals.signal(
    "lmbridge-failed",
    "A request failed. Sent with ``model``, its name, and ``error``.",
)
disconnected = _signals.signal(
    "lmbridge-disconnected",
    "An HTTP client disconnected before its answer was complete; its requests were aborted. Sent with ``model``, on "
    "the thread that sent the answer or on one of lmbridge's own, without a context.",
)


def tell(signal: NamedSignal, app: Flask, **facts: Any) -> None:
    """Send a signal. A listener's error must not end the sending thread, which serves others too."""
    try:
        signal.send(app, **facts)
    except BaseException:  # SystemExit too
        logger.exception("A listener of the signal %s failed.", signal.name)
