"""The counters of a bridge; ``lmbridge.prometheus`` exports them.

Rule: written on the server thread, once per request and never per token, except what the gate counts; any thread may
read. Counting is plain arithmetic, because every request pays for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from lmbridge.messages import Outcome, Response

CANCELS = {
    "RequestTimeoutError": "deadline",
    "abort": "left",  # a stream closed by its reader
    "CancelledError": "left",  # a cancelled future
    "DisconnectedError": "disconnect",
    "RequestAbortedError": "aborted",
    "BridgeClosedError": "closed",
}
"""Outcomes of cancelled requests, with the cause of each."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of values between the bounds ``SECONDS``, and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)  # the last counts values above every bound
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(SECONDS, value)] += times
        self.sum += value * times


class Metrics:
    """What one bridge has counted since it was built; times are in seconds.

    Once every request has ended, ``started`` is the sum of ``outcomes``.

    Attributes:
        started: all requests that asked for a place in the queue.
        outcomes: ended requests by how they ended: a finish_reason, or the name of the error's class.
        prompt_tokens, completion_tokens: of answered requests.
        queued: how long answered requests waited until the engine took them.
        first_token: from submission to the first token.
        inter_token: between tokens; each answer contributes its mean, once per gap.
        total: from submission to the end.
    """

    def __init__(self) -> None:
        self.started = 0  # written under the gate's lock
        self.outcomes: Counter[str] = Counter()  # the gate counts QueueFullError under its lock, and only that
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.queued = Histogram()
        self.first_token = Histogram()
        self.inter_token = Histogram()
        self.total = Histogram()

    @property
    def cancels(self) -> dict[str, int]:
        """Ended requests that were cancelled, by cause; every cause has an entry."""
        causes = dict.fromkeys(CANCELS.values(), 0)
        for outcome, count in dict(self.outcomes).items():  # a copy in one step; the server thread adds to it
            if outcome in CANCELS:
                causes[CANCELS[outcome]] += count
        return causes

    def ended(self, outcome: Outcome) -> None:
        """Count one ended request."""
        if not isinstance(outcome, Response):
            self.outcomes[type(outcome).__name__] += 1
            return
        self.outcomes[outcome.finish_reason] += 1
        timings, usage = outcome.timings, outcome.usage
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        # Histogram.observe three times, inlined: the calls would be half the cost of counting.
        self.queued.counts[bisect_left(SECONDS, timings.queued)] += 1
        self.queued.sum += timings.queued
        self.total.counts[bisect_left(SECONDS, timings.total)] += 1
        self.total.sum += timings.total
        if timings.first_token is None:
            return
        self.first_token.counts[bisect_left(SECONDS, timings.first_token)] += 1
        self.first_token.sum += timings.first_token
        gaps = usage.completion_tokens - 1
        if gaps > 0:
            self.inter_token.observe((timings.total - timings.first_token) / gaps, gaps)
