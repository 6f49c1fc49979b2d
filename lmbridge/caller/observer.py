"""Who hears of a client's calls: for tracing, accounting and signals.

Rule: called on callers' threads; what it raises is logged and goes no further.
"""

from __future__ import annotations

from lmbridge.messages import Outcome, Request


class Observer:
    """Hears of a client's calls; subclass it and give it to ``bridge.client(observer=…)``."""

    def begun(self, request: Request) -> None:
        """Before the request is sent, on the calling thread.

        ``request.context`` is the request's own copy of the caller's context variables, in which the engine begins it.
        """

    def ended(self, request: Request, outcome: Outcome) -> None:
        """Once for each request that was begun, when its end is known to whoever reads it.

        Called by the thread that waits or reads; by the one that runs the callbacks of futures, for these and for
        streams that were left; or by ``Client.close`` and ``Bridge.close`` for what nobody has read to its end. A
        Response holds the text that was generated.
        """
