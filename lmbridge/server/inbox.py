"""What callers have put down for the server thread: calls that were sent, and calls to be stopped.

Rule: server thread only; it comes here when the doorbell was rung, and at every sweep.
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
        """Look at everything that is there."""
        handle, calls = self._handle, self._calls
        if calls.left_behind:
            return
        handle.wakes.held = True  # what is said meanwhile wakes its readers together
        while handle.sent and not calls.left_behind:  # one entry for each call sent
            call = handle.sent.popleft().take()
            if call is not None:
                calls.arrive(call)
        while handle.aborted and not calls.left_behind:
            aborted = handle.aborted.popleft()
            self.collect(aborted.channel)  # its caller may have been interrupted between put and ring
            calls.abort(aborted)
        if calls.turns.lanes:
            calls.pump()
        if not calls.left_behind:  # else another thread owns the chain
            handle.wakes.start()

    def collect(self, channel: Channel[Call]) -> None:
        """Take in what was sent by this channel without a word."""
        while (call := channel.take()) is not None:
            self._calls.arrive(call)
