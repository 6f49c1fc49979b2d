"""Who is next: the queue between the gate and the engine, in fair turns.

Rule: server thread only. Requests queue here and at the gate, and nowhere else.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from lmbridge.crossing.call import Call

_Lanes = OrderedDict[str, OrderedDict[Call, None]]  # the calls of each client, in order of turns; no lane is empty


class Turns:
    """The queue between clients and engine: clients take turns, first come first served within one.

    Calls of one priority take turns among themselves. The next is of the priority that is most urgent, where every
    ``AGING`` seconds for which its next call has waited count as one level; of equal ones, the one that waits longer.
    """

    AGING = 10.0

    def __init__(self) -> None:
        self.lanes: dict[int, _Lanes] = {}  # by priority; usually there is one, and none when nobody waits

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
        """The next call, of which there must be one. Its client goes to the end of the line."""
        call = self._next()
        request = call.request
        self.lanes[request.priority].move_to_end(request.client)
        self.remove(call)
        return call

    def remove(self, call: Call) -> None:
        """Take out a call that will not be begun."""
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
