"""Counts an app's HTTP responses by route and status, and measures how long they take.

Rule: learns of every request from Flask's signals, whether a view, an error or no route responds to it. The label
``route`` is the URL rule that matched and never the path, of which clients could make up any number.
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
UNMATCHED = "none"  # the route of a request that no rule matches


class Answers:
    """The responses of one app; a collector for a registry of prometheus_client."""

    def __init__(self) -> None:
        self._ended: deque[tuple[str, int, float]] = deque()  # not counted yet
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()  # guarded by _lock, as is the next
        self._seconds: defaultdict[str, Histogram] = defaultdict(Histogram)

    def count(self, route: str, status: int, began: float) -> None:
        """Count a response that was sent or whose client left. Never blocks: a finalizer may call it anywhere."""
        self._ended.append((route, status, time.monotonic() - began))
        if self._lock.acquire(blocking=False):  # else the holder of the lock counts this one, or the next caller does
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Count the ended responses. The caller holds the lock."""
        while self._ended:
            route, status, seconds = self._ended.popleft()
            self._counts[route, status] += 1
            self._seconds[route].observe(seconds)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        """The current metrics."""
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
    """Start counting the app's responses."""
    app.extensions[EXTENSION] = Answers()
    request_started.connect(_begin, app)
    request_finished.connect(_end, app)


def current_answers() -> Answers:
    """The counts of the current app."""
    found = current_app.extensions[EXTENSION]
    assert isinstance(found, Answers)
    return found


def _begin(_: Flask, **more: Any) -> None:
    g.lmbridge_began = time.monotonic()


def _end(_: Flask, response: Response, **more: Any) -> None:
    rule = request.url_rule
    route = UNMATCHED if rule is None else rule.rule
    count = partial(current_answers().count, route, response.status_code, g.get("lmbridge_began", time.monotonic()))
    if response.direct_passthrough:  # a file, which the server sends by itself, without telling us of the end
        count()
    else:  # Werkzeug's server does not close a response if the client resets the connection after reading it all
        response.call_on_close(weakref.finalize(response, count))
