"""The loop end: the event loop of one server thread and its parts.

Rule: created by any thread, used only by the server thread, except where noted.
"""

from __future__ import annotations

import asyncio
import contextvars

from lmbridge.crossing.handle import ServerHandle
from lmbridge.metrics import Metrics
from lmbridge.server.calls import Calls
from lmbridge.server.inbox import Inbox
from lmbridge.server.sweep import Sweep


class ServerLoop:
    """One server thread's loop with its inbox, its calls and its sweep."""

    def __init__(self, handle: ServerHandle, metrics: Metrics, stall_timeout: float | None) -> None:
        # a loop keeps the context it is made in, which would be the first caller's, with a web request in it
        self.loop = contextvars.Context().run(asyncio.new_event_loop)
        self.handle = handle
        self.calls = Calls(handle, self.loop, metrics)
        self.inbox = Inbox(handle, self.calls)
        self.sweep = Sweep(handle, self.calls, self.inbox, stall_timeout)
        self.loss: BaseException = TimeoutError("the server thread was stuck and has been replaced")

    def open(self, stuck: ServerLoop | None) -> None:
        """Start answering callers, taking over from a stuck thread if there is one."""
        self.handle.attach(self.loop, self.inbox.answer)
        if stuck is not None:
            self.calls.take_over(stuck.calls, stuck.loss)
