"""What an app can listen to.

Rule: sent on the thread of the HTTP request, once per request to a bridge; the sender is the app.
"""

from __future__ import annotations

from blinker import Namespace

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
    "An HTTP client went away before its answer was complete; its requests were aborted. Sent with ``model``. On a "
    "thread of lmbridge's own, without a context.",
)
