"""What a bridge counts, and what Prometheus is told."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lmbridge import (
    Bridge,
    BridgeClosedError,
    EngineError,
    MissingDependencyError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
)
from lmbridge.prometheus import BridgeCollector
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from tests.conftest import until


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
        until(lambda: not bridge.health().waiting)
        future = bridge.submit("cancelled")
        with pytest.raises(QueueFullError):
            bridge.infer("no room")
        future.cancel()
        engine.step(3)
        assert good.result(30).text == "one two three"
        assert isinstance(bad.exception(30), EngineError)
        until(lambda: not bridge.requests())
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
        assert samples["lmbridge_requests_started_total model=scripted"] == 2
        assert samples["lmbridge_completion_tokens_total model=scripted"] == 5
        assert samples["lmbridge_request_seconds_count model=scripted"] == 2
        assert samples["lmbridge_request_seconds_bucket le=+Inf model=scripted"] == 2
        assert samples["lmbridge_request_seconds_sum model=scripted"] == pytest.approx(bridge.metrics.total.sum)
        assert samples["lmbridge_running model=scripted"] == 0
        assert samples["lmbridge_ready model=scripted"] == 1
        assert samples["lmbridge_engine_tokens_total model=scripted"] == 5


def test_cancels_by_cause() -> None:
    """Requests that nobody wanted any more are counted by whose doing it was, and no other request is."""
    engine = ScriptedEngine(manual=True)
    with Bridge(engine) as bridge:
        streams = [bridge.stream(prompt) for prompt in ("left", "left too")]
        aborted, fine = bridge.submit("aborted", request_id="this one"), bridge.submit("fine")
        with pytest.raises(RequestTimeoutError):
            bridge.infer("too slow", timeout=0.01)
        with bridge.client() as client:
            closed = client.submit("closed")
        for stream in streams:
            stream.close()
        bridge.abort("this one")
        assert isinstance(aborted.exception(30), RequestAbortedError)
        assert isinstance(closed.exception(30), BridgeClosedError)
        engine.wait_for(lambda e: e.active == 1)
        engine.step()
        assert fine.result(30).text == "fine"
        samples = scrape(bridge)
        for cause, count in {"left": 2, "deadline": 1, "aborted": 1, "closed": 1}.items():
            assert samples[f"lmbridge_cancels_total cause={cause}"] == count


def test_batch_size() -> None:
    """The mean number of tokens in a step, and how much of a step that fills."""
    engine = ScriptedEngine(manual=True, max_batch_size=4)
    with Bridge(engine) as bridge, ThreadPoolExecutor() as pool:
        assert "lmbridge_batch_size" not in scrape(bridge)
        answers = [pool.submit(bridge.infer, "one two three") for _ in range(2)]
        engine.wait_for(lambda e: e.active == 2)
        engine.step(3)
        assert [answer.result(30).text for answer in answers] == ["one two three"] * 2
        samples = scrape(bridge)
        assert (samples["lmbridge_batch_size"], samples["lmbridge_batch_efficiency"]) == (2, 0.5)
        assert samples["lmbridge_engine_steps_total"] == 3


def test_memory_of_the_device() -> None:
    """A real engine says how much memory it has: on a CPU, that of a process with torch and a model in it."""
    with Bridge("demo", device="cpu") as bridge:
        samples = scrape(bridge)
        assert samples["lmbridge_engine_memory_bytes"] > 50e6
        assert samples["lmbridge_engine_max_batch_size"] == 64


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


def test_an_encoders_batches_are_reported() -> None:
    """How full its batches are and how many texts it does are what an embedding server is tuned by."""
    with Bridge(ScriptedEncoder(max_batch_size=4)) as bridge:
        bridge.embed(["a b", "c", "d e f"])
        samples = scrape(bridge)
    assert samples["lmbridge_engine_items_total"] == 3
    assert samples["lmbridge_engine_tokens_total"] == 6
    assert samples["lmbridge_batch_size"] == 3 / samples["lmbridge_engine_batches_total"]
