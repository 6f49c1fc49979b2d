"""Who is next: the queue between the gate and the engine, in fair turns.

Rule: server thread only. Requests queue here and at the gate, and nowhere else.
"""

from __future__ import annotations

import time
from collections import deque

from lmbridge.crossing.call import Call


class Turns:
    """The queue between clients and engine: clients take turns, first come first served within one.

    Each (client, priority) is a lane. The next request comes from the lane whose head has the highest priority, where
    every ``AGING`` seconds of waiting count as one level; equal lanes take turns.
    """

    AGING = 10.0

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, int], deque[Call]] = {}  # in order of turns; empty when nobody waits
        self._prioritised = 0  # how many calls have a priority of their own; usually none

    def push(self, call: Call) -> None:
        request = call.request
        lane = (request.client, request.priority)
        queue = self.lanes.get(lane)
        if queue is None:
            self.lanes[lane] = deque((call,))
        else:
            queue.append(call)
        self._prioritised += request.priority != 0

    def pop(self) -> Call:
        """The next call, of which there must be one. Its client goes to the end of the line."""
        lane = self._most_urgent() if self._prioritised else next(iter(self.lanes))
        queue = self.lanes.pop(lane)
        call = queue.popleft()
        if queue:
            self.lanes[lane] = queue
        self._prioritised -= call.request.priority != 0
        return call

    def remove(self, call: Call) -> None:
        """Take out a call that will not be begun."""
        lane = (call.request.client, call.request.priority)
        queue = self.lanes[lane]
        queue.remove(call)
        self._prioritised -= call.request.priority != 0
        if not queue:
            del self.lanes[lane]

    def _most_urgent(self) -> tuple[str, int]:
        now = time.monotonic()

        def urgency(lane: tuple[str, int]) -> float:
            waited = now - self.lanes[lane][0].request.created
            return lane[1] + waited // self.AGING

        return max(self.lanes, key=urgency)  # the first of equals, so turns hold
