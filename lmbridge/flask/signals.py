"""What an app can listen to.

Rule: sent once per request to a bridge, when its outcome is known: by the view's thread, by the one that sent the
response for a stream, by the bridge's own for a future. The sender is the app.
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
