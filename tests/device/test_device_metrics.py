"""What Prometheus is told of a device."""

from __future__ import annotations

import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lmbridge import Device, MissingDependencyError
from lmbridge.prometheus import DeviceCollector
from tests.device.sized import GB, Model


def scrape(device: Device, labels: dict[str, str] | None = None) -> dict[str, float]:
    """Every sample that Prometheus would get, by name and labels."""
    registry = CollectorRegistry()
    registry.register(DeviceCollector(device, labels))
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_what_is_held_and_who_computes() -> None:
    """Whoever watches a machine would not see what its models hold, push out and use of it."""
    device = Device(memory="1GB")
    with Model("a").on(device) as a, Model("b").on(device) as b:
        engine = a.start()._server_thread.engine
        assert engine is not None
        with engine.party.turn():
            pass
        samples = scrape(device, {"machine": "m"})
        assert samples["lmbridge_device_memory_bytes device=cpu machine=m"] == GB
        assert samples["lmbridge_device_reserved_bytes device=cpu machine=m"] == GB
        assert samples["lmbridge_device_loads_total device=cpu machine=m"] == 3
        assert samples["lmbridge_device_unloads_total device=cpu machine=m"] == 2
        assert samples["lmbridge_device_seconds_total device=cpu machine=m model=a"] > 0
        assert samples["lmbridge_device_seconds_total device=cpu machine=m model=b"] == 0
        assert b.state == "unloaded"


def test_a_device_without_a_limit() -> None:
    """A limit that there is not would be plotted as none left."""
    samples = scrape(Device())
    assert not any("memory" in name for name in samples)
    assert samples["lmbridge_device_reserved_bytes device=cpu"] == 0


def test_without_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library missing, the error says how to get it."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match="pip install prometheus-client"):
        DeviceCollector(Device())
