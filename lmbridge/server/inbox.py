"""The server thread's inbox: calls sent, and calls to stop.

Rule: server thread only; runs when the doorbell rings, and at every sweep.
"""

from __future__ import annotations

from lmbridge.crossing.call import Call
from lmbridge.crossing.channel import Channel
from lmbridge.crossing.handle import ServerHandle
from lmbridge.server.calls import Calls


class Inbox:
    """Empties the handle."""

    def __init__(self, handle: ServerHandle, calls: Calls) -> None:
        self._handle = handle
        self._calls = calls

    def answer(self) -> None:
        """Process everything in the inbox."""
        handle, calls = self._handle, self._calls
        if calls.left_behind:
            return
        handle.wakes.held = True  # readers of what follows are woken together
        while handle.sent and not calls.left_behind:  # one entry per sent call
            call = handle.sent.popleft().take()
            if call is not None:
                calls.arrive(call)
        while handle.aborted and not calls.left_behind:
            aborted = handle.aborted.popleft()
            self.collect(aborted.channel)  # its caller may have been interrupted between put and ring
            calls.abort(aborted)
        if calls.turns.lanes:
            calls.pump()
        if not calls.left_behind:  # otherwise another thread owns the chain
            handle.wakes.start()

    def collect(self, channel: Channel[Call]) -> None:
        """Take in everything sent through this channel."""
        while (call := channel.take()) is not None:
            self._calls.arrive(call)
