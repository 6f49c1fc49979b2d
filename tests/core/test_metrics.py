"""What a bridge counts, and what Prometheus is told."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lmbridge import Bridge, EngineError, MissingDependencyError, QueueFullError, RequestTimeoutError
from lmbridge.prometheus import BridgeCollector
from lmbridge.testing import ScriptedEngine


def scrape(bridge: Bridge, labels: dict[str, str] | None = None) -> dict[str, float]:
    """Every sample that Prometheus would get, by name and labels."""
    registry = CollectorRegistry()
    registry.register(BridgeCollector(bridge, labels))
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_every_request_is_counted_once() -> None:
    """Answers, errors, deadlines, aborts and what found no room, each by how it ended."""
    engine = ScriptedEngine(manual=True, max_batch_size=2)
    engine.fail("bad", EngineError("as told"))
    with Bridge(engine, max_pending=1, when_full="reject") as bridge, ThreadPoolExecutor() as pool:
        good = pool.submit(bridge.infer, "one two three")
        engine.wait_for(lambda e: e.active == 1)
        bad = pool.submit(bridge.infer, "bad")
        engine.wait_for(lambda e: e.active == 2)
        waiting = pool.submit(bridge.infer, "too late", timeout=0.05)
        with pytest.raises(RequestTimeoutError):
            waiting.result(30)
        while bridge.health().waiting:
            pass
        future = bridge.submit("cancelled")
        with pytest.raises(QueueFullError):
            bridge.infer("no room")
        future.cancel()
        engine.step(3)
        assert good.result(30).text == "one two three"
        assert isinstance(bad.exception(30), EngineError)
        while bridge.requests():
            pass
        assert bridge.metrics.outcomes == {
            "stop": 1, "EngineError": 1, "RequestTimeoutError": 1, "QueueFullError": 1, "CancelledError": 1,
        }  # fmt: skip
        assert (bridge.metrics.prompt_tokens, bridge.metrics.completion_tokens) == (3, 3)


def test_times_of_a_request() -> None:
    """Each answer is in every histogram once; the gaps between its tokens as often as there are gaps."""
    with Bridge(ScriptedEngine()) as bridge:
        answers = [bridge.infer("one two three four") for _ in range(5)]
        metrics = bridge.metrics
        assert (metrics.queued.count, metrics.first_token.count, metrics.total.count) == (5, 5, 5)
        assert metrics.inter_token.count == 15
        assert metrics.total.sum == pytest.approx(sum(answer.timings.total for answer in answers))


def test_prometheus() -> None:
    """What the client library prints can be parsed, carries the labels, and agrees with the bridge."""
    with Bridge(ScriptedEngine()) as bridge:
        bridge.infer(["one two", "three four five"])
        samples = scrape(bridge, {"model": "scripted"})
        assert samples["lmbridge_requests_total model=scripted outcome=stop"] == 2
        assert samples["lmbridge_completion_tokens_total model=scripted"] == 5
        assert samples["lmbridge_request_seconds_count model=scripted"] == 2
        assert samples["lmbridge_request_seconds_bucket le=+Inf model=scripted"] == 2
        assert samples["lmbridge_request_seconds_sum model=scripted"] == pytest.approx(bridge.metrics.total.sum)
        assert samples["lmbridge_running model=scripted"] == 0
        assert samples["lmbridge_ready model=scripted"] == 1
        assert samples["lmbridge_engine_tokens model=scripted"] == 5


def test_scraping_starts_nothing() -> None:
    """A bridge that has not been used tells so without loading a model."""
    bridge = Bridge("demo")
    samples = scrape(bridge)
    assert (samples["lmbridge_ready"], bridge.state) == (0, "new")


def test_without_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library missing, the error says how to get it."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match="pip install prometheus-client"):
        BridgeCollector(Bridge("demo"))
