"""A bridge's metrics and a device's for Prometheus, through its own client library.

Rule: asks the bridge when somebody scrapes, and costs its requests nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmbridge.bridge import Bridge
from lmbridge.device import Device
from lmbridge.errors import MissingDependencyError
from lmbridge.metrics import SECONDS, Histogram

ENGINE_COUNTERS = {
    "steps": "Steps of the engine.",
    "tokens": "Tokens the engine has made, for whatever answers; read, for an encoder.",
    "batches": "Batches of the engine.",
    "items": "Texts or items in its batches.",
}
ENGINE_GAUGES = {
    "in_flight": "Requests inside the engine.",
    "max_batch_size": "Requests that fit into a step.",
    "max_batch_tokens": "Tokens that fit into a batch, as of now.",
    "padding_share": "The share of what was computed that stood for no token.",
    "cache_free": "The share of the cache that nobody holds.",
    "memory_bytes": "Memory of the device that the engine runs on: CUDA's, or the process's on a CPU.",
}
"""What engines may say in ``stats()``; anything else is a gauge too."""


class BridgeCollector:
    """A bridge's metrics for a registry of prometheus_client: ``REGISTRY.register(BridgeCollector(bridge))``.

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
        yield self._counter("requests_started", "Requests that were made.", {"": metrics.started})
        yield self._counter("cancels", "Requests that were cancelled, by cause.", metrics.cancels, "cause")
        yield self._counter("prompt_tokens", "Tokens of answered prompts.", {"": metrics.prompt_tokens})
        yield self._counter("completion_tokens", "Generated tokens of answers.", {"": metrics.completion_tokens})
        yield self._counter("restarts", "Engines that died and were followed by a new one.", {"": health.restarts})
        yield self._histogram("queue_seconds", "Submission until the engine took the request.", metrics.queued)
        yield self._histogram("first_token_seconds", "Submission until the first token.", metrics.first_token)
        yield self._histogram("inter_token_seconds", "Between tokens; the mean of each answer.", metrics.inter_token)
        yield self._histogram("request_seconds", "Submission until the end.", metrics.total)
        yield self._gauge("waiting", "Requests that wait for the engine.", health.waiting)
        yield self._gauge("running", "Requests in the engine.", health.running)
        yield self._gauge("ready", "1 while requests are served.", float(health.state in ("ready", "unloaded")))
        yield from self._engine(self._bridge.stats())

    def _engine(self, stats: dict[str, float]) -> Iterator[Any]:
        for name, value in stats.items():
            if name in ENGINE_COUNTERS:  # they begin anew with each engine, as those of a process do
                yield self._counter(f"engine_{name}", ENGINE_COUNTERS[name], {"": value})
            else:
                text = ENGINE_GAUGES.get(name, f"What the engine counts as {name}.")
                yield self._gauge(f"engine_{name}", text, value)
        mean = mean_batch_size(stats)
        if mean is not None:
            yield self._gauge("batch_size", "Tokens of a step, or items of a batch; the mean since the start.", mean)
            if stats.get("max_batch_size"):
                share = mean / stats["max_batch_size"]
                yield self._gauge("batch_efficiency", "That mean as a share of max_batch_size.", share)

    def _counter(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> Any:
        names = [*self._labels, *([label] if label else [])]
        family = self._core.CounterMetricFamily(f"lmbridge_{name}", text, labels=names)
        for value, count in dict(values).items():  # a copy in one step; the server thread adds to it
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


class DeviceCollector:
    """A device's metrics for a registry of prometheus_client: ``REGISTRY.register(DeviceCollector(Device.of("cpu")))``.

    Each carries the label ``device``; the seconds and bytes of a model also ``model``, of which several bridges of one
    label make one.

    Args:
        device: what to report.
        labels: put on every metric besides.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
    """

    def __init__(self, device: Device, labels: dict[str, str] | None = None) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise MissingDependencyError("Prometheus export needs: pip install prometheus-client") from error
        self._core = core
        self._device = device
        self._labels = {"device": device.name, **(labels or {})}

    def describe(self) -> list[Any]:
        """Nothing: a registry must not ask a device before somebody scrapes."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        status = self._device.status()
        if status.memory is not None:
            yield self._gauge("memory_bytes", "Memory that models may have.", {"": status.memory})
        yield self._gauge("reserved_bytes", "Memory that models hold, or are about to.", {"": status.reserved})
        held: dict[str, float] = {}
        for party in status.parties:
            held[party.label] = held.get(party.label, 0.0) + party.bytes
        yield self._gauge("model_bytes", "Memory that a model holds, or is about to.", held, "model")
        yield self._counter("loads", "Models that were loaded.", {"": status.loads})
        yield self._counter("unloads", "Models unloaded for others, or for being idle.", {"": status.unloads})
        seconds: dict[str, float] = {}
        for party in status.parties:
            seconds[party.label] = seconds.get(party.label, 0.0) + party.seconds
        yield self._counter("seconds", "Time for which a model has had the device.", seconds, "model")

    def _gauge(self, *what: Any) -> Any:
        return self._family(self._core.GaugeMetricFamily, *what)

    def _counter(self, *what: Any) -> Any:
        return self._family(self._core.CounterMetricFamily, *what)

    def _family(self, kind: Any, name: str, text: str, values: Mapping[str, float], label: str = "") -> Any:
        """A family with one number, or one for each value of a further label."""
        family = kind(f"lmbridge_device_{name}", text, labels=[*self._labels, *([label] if label else [])])
        for value, number in values.items():
            family.add_metric([*self._labels.values(), *([value] if label else [])], number)
        return family


def mean_batch_size(stats: Mapping[str, float]) -> float | None:
    """Tokens made in a step, or items in a batch, from what ``Bridge.stats`` says; None where both are not counted."""
    if stats.get("batches") and "items" in stats:
        return stats["items"] / stats["batches"]
    if not stats.get("steps") or "tokens" not in stats:
        return None
    return stats["tokens"] / stats["steps"]
