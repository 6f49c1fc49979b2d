"""Observers of a client's calls, for tracing, accounting and signals.

Rule: called on callers' threads; an exception it raises is logged and goes no further.
"""

from __future__ import annotations

from lmbridge.messages import Outcome, Request


class Observer:
    """Gets notified of a client's calls; subclass it and pass it to ``bridge.client(observer=…)``."""

    def begun(self, request: Request) -> None:
        """Called before the request is sent, on the calling thread.

        ``request.context`` is the request's own copy of the caller's context variables; the engine starts in it.
        """

    def ended(self, request: Request, outcome: Outcome) -> None:
        """Called once for each request begun, when its reader knows how it ended.

        Runs on the thread that waits or reads; for futures and abandoned streams, on the callback thread; for what
        nobody has read to the end, in ``Client.close`` and ``Bridge.close``. A Response holds the generated text.
        """
