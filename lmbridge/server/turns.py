"""The fair queue between the gate and the engine.

Rule: server thread only. Requests queue here and at the gate, and nowhere else.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from lmbridge.crossing.call import Call

_Lanes = OrderedDict[str, OrderedDict[Call, None]]  # each client's calls, in order of turns; no lane is empty


class Turns:
    """The queue before the engine: clients take turns; within a client, first come first served.

    Calls of one priority take turns among themselves. The most urgent priority is next, where every ``AGING`` seconds
    that its next call has waited count as one level; between equals, the one that has waited longer.
    """

    AGING = 10.0

    def __init__(self) -> None:
        self.lanes: dict[int, _Lanes] = {}  # by priority; usually one, and none when no call waits

    def push(self, call: Call) -> None:
        request = call.request
        lanes = self.lanes.get(request.priority)
        if lanes is None:
            lanes = self.lanes[request.priority] = OrderedDict()
        lane = lanes.get(request.client)
        if lane is None:
            lane = lanes[request.client] = OrderedDict()
        lane[call] = None

    def pop(self) -> Call:
        """The next call; there must be one. Its client moves to the end of the line."""
        call = self._next()
        request = call.request
        self.lanes[request.priority].move_to_end(request.client)
        self.remove(call)
        return call

    def remove(self, call: Call) -> None:
        """Remove a call that will not begin."""
        request = call.request
        lanes = self.lanes[request.priority]
        lane = lanes[request.client]
        del lane[call]
        if not lane:
            del lanes[request.client]
            if not lanes:
                del self.lanes[request.priority]

    def _next(self) -> Call:
        heads = [next(iter(next(iter(lanes.values())))) for lanes in self.lanes.values()]
        if len(heads) == 1:
            return heads[0]
        now = time.monotonic()

        def urgency(call: Call) -> tuple[float, float]:
            waited = now - call.request.created
            return call.request.priority + waited // self.AGING, waited

        return max(heads, key=urgency)
