"""What a bridge counts, once, and how Prometheus gets it.

Rule: ``Metrics`` is written on the server thread, once per request and never per token; anybody may read it.
Counting is plain arithmetic, because each request pays for it; the client library comes in where somebody scrapes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmbridge.call import Outcome
from lmbridge.errors import MissingDependencyError
from lmbridge.messages import Response

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many values fell between which of the bounds ``SECONDS``, and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)  # the last is what lies above every bound
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(SECONDS, value)] += times
        self.sum += value * times


class Metrics:
    """What one bridge has counted since it was built; times are in seconds.

    Attributes:
        outcomes: ended requests by how they ended: a finish_reason, or the name of the error's class.
        prompt_tokens, completion_tokens: of answered requests.
        queued: how long answered requests waited until the engine took them.
        first_token: from submission to the first token.
        inter_token: between tokens; each answer counts its mean, once for each of its gaps.
        total: from submission to the end.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.queued = Histogram()
        self.first_token = Histogram()
        self.inter_token = Histogram()
        self.total = Histogram()
        self._lock = threading.Lock()

    def refused(self) -> None:
        """Count one request that found no room. Any thread; the server thread never touches this outcome."""
        with self._lock:
            self.outcomes["QueueFullError"] += 1

    def ended(self, outcome: Outcome) -> None:
        """Count one request that has had the server's final word."""
        if not isinstance(outcome, Response):
            self.outcomes[type(outcome).__name__] += 1
            return
        self.outcomes[outcome.finish_reason] += 1
        timings, usage = outcome.timings, outcome.usage
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        # Three times Histogram.observe, written out: calling it would be half of what counting costs.
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


class BridgeCollector:
    """A bridge's metrics for a registry of prometheus_client: ``REGISTRY.register(BridgeCollector(bridge))``.

    Scraping asks the bridge and costs its requests nothing.

    Args:
        bridge: what to report.
        labels: put on every metric, such as ``{"model": "demo"}``; needed where one registry has several bridges.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
    """

    def __init__(self, bridge: Bridge, labels: dict[str, str] | None = None) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise MissingDependencyError("Prometheus export needs: pip install prometheus-client") from error
        self._core = core
        self._bridge = bridge
        self._labels = labels or {}

    def describe(self) -> list[Any]:
        """Nothing: which metrics there are depends on the engine, which a registry must not start."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        metrics, health = self._bridge.metrics, self._bridge.health()
        yield self._counter("requests", "Ended requests by outcome.", metrics.outcomes, "outcome")
        yield self._counter("prompt_tokens", "Tokens of answered prompts.", {"": metrics.prompt_tokens})
        yield self._counter("completion_tokens", "Generated tokens of answers.", {"": metrics.completion_tokens})
        yield self._counter("restarts", "Engines that died and were followed by a new one.", {"": health.restarts})
        yield self._histogram("queue_seconds", "Submission until the engine took the request.", metrics.queued)
        yield self._histogram("first_token_seconds", "Submission until the first token.", metrics.first_token)
        yield self._histogram("inter_token_seconds", "Between tokens; the mean of each answer.", metrics.inter_token)
        yield self._histogram("request_seconds", "Submission until the end.", metrics.total)
        yield self._gauge("waiting", "Requests that wait for the engine.", health.waiting)
        yield self._gauge("running", "Requests in the engine.", health.running)
        yield self._gauge("ready", "1 while requests are served.", float(health.state == "ready"))
        for name, value in self._bridge.stats().items():
            yield self._gauge(f"engine_{name}", f"What the engine counts as {name}.", value)

    def _counter(self, name: str, text: str, values: dict[str, int], label: str = "") -> Any:
        names = [*self._labels, *([label] if label else [])]
        family = self._core.CounterMetricFamily(f"lmbridge_{name}", text, labels=names)
        for value, count in list(values.items()):
            family.add_metric([*self._labels.values(), *([value] if label else [])], count)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = self._core.GaugeMetricFamily(f"lmbridge_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Any:
        family = self._core.HistogramMetricFamily(f"lmbridge_{name}", text, labels=list(self._labels))
        counts, buckets, below = list(histogram.counts), [], 0
        for bound, count in zip([*SECONDS, float("inf")], counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
        family.add_metric(list(self._labels.values()), buckets, histogram.sum)
        return family
