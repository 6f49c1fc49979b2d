"""How many HTTP answers an app gave, by route and status, and how long they took.

Rule: hears of each request from Flask's signals, whatever answers it: a view, an error, or no route at all. A route is
the rule that matched and never the path, of which clients could make as many as they like.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

from flask import Flask, Response, current_app, g, request
from flask.signals import request_finished, request_started

from lmbridge.metrics import SECONDS, Histogram

EXTENSION = "lmbridge_answers"
UNMATCHED = "none"  # the route of what no rule matches


class Answers:
    """What one app has answered; a collector for a registry of prometheus_client."""

    def __init__(self) -> None:
        self._ended: deque[tuple[str, int, float]] = deque()  # not counted yet
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()  # guarded by _lock, as is the next
        self._seconds: defaultdict[str, Histogram] = defaultdict(Histogram)

    def count(self, route: str, status: int, began: float) -> None:
        """Count an answer that was sent, or whose client has left. Never waits: a finalizer may call it anywhere."""
        self._ended.append((route, status, time.monotonic() - began))
        if self._lock.acquire(blocking=False):  # else whoever holds it counts this one, or the next who comes
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Count what has ended; the lock is held."""
        while self._ended:
            route, status, seconds = self._ended.popleft()
            self._counts[route, status] += 1
            self._seconds[route].observe(seconds)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        counter = CounterMetricFamily("lmbridge_http_answers", "HTTP answers.", labels=["route", "status"])
        text = "From an HTTP request's arrival until its answer was sent."
        histogram = HistogramMetricFamily("lmbridge_http_seconds", text, labels=["route"])
        bounds = [*map(str, SECONDS), "+Inf"]
        with self._lock:
            self._settle()
            for (route, status), count in self._counts.items():
                counter.add_metric([route, str(status)], count)
            for route, seconds in self._seconds.items():
                below = zip(bounds, accumulate(seconds.counts), strict=True)
                histogram.add_metric([route], list(below), seconds.sum)
        yield counter
        yield histogram


def count_answers(app: Flask) -> None:
    """Have the app's answers counted from now on."""
    app.extensions[EXTENSION] = Answers()
    request_started.connect(_begin, app)
    request_finished.connect(_end, app)


def current_answers() -> Answers:
    """The current app's."""
    found = current_app.extensions[EXTENSION]
    assert isinstance(found, Answers)
    return found


def _begin(_: Flask, **more: Any) -> None:
    g.lmbridge_began = time.monotonic()


def _end(_: Flask, response: Response, **more: Any) -> None:
    rule = request.url_rule
    route = UNMATCHED if rule is None else rule.rule
    count = partial(current_answers().count, route, response.status_code, g.get("lmbridge_began", time.monotonic()))
    if response.direct_passthrough:  # a file, which the server sends by its own means; nobody hears of the end
        count()
    else:  # Werkzeug's server closes no answer whose client resets the connection once it has all: then it is collected
        response.call_on_close(weakref.finalize(response, count))
