"""OpenTelemetry: what the span of a generation says, and that none is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from flask import Flask
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lmbridge import Bridge, EngineError, Request
from lmbridge.flask import tracing
from lmbridge.flask.reporting import Reporter
from lmbridge.testing import ScriptedEncoder, ScriptedEngine

Scripted = Callable[..., tuple[Bridge, ScriptedEngine]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What has been traced; the provider of the process is put aside."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


@pytest.fixture
def reporter() -> Reporter:
    """What the clients of HTTP requests are observed by."""
    return Reporter(Flask("traced"), "demo")


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == tracing.SPAN]
    return span


def test_an_answer(spans: InMemorySpanExporter, scripted: Scripted, reporter: Reporter) -> None:
    """The span is a child of the HTTP request's, names model, tokens and finish reason, and says when what happened."""
    bridge, _ = scripted()
    http = trace.get_tracer("test").start_span("POST /ask")
    with bridge.client(observer=reporter) as client:
        with trace.use_span(http, end_on_exit=True):
            stream = client.stream("one two three")
            assert trace.get_current_span() is http
        for _ in stream:
            pass
    span = only(spans)
    assert span.parent == http.get_span_context()
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lmbridge",
        "gen_ai.request.model": "demo",
        "gen_ai.response.id": stream.request_id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
    }
    taken, first = span.events
    assert (taken.name, first.name) == ("lmbridge.taken_by_engine", "lmbridge.first_token")
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= taken.timestamp <= first.timestamp <= span.end_time


def test_jobs(spans: InMemorySpanExporter, reporter: Reporter) -> None:
    """Each text and each document is a span of its own, under the name of what was done with it."""
    with Bridge(ScriptedEncoder()) as bridge, bridge.client(observer=reporter) as client:
        client.embed(["one two", "three"])
        client.rerank("one", ["one two"])
    found = [(span.name, dict(span.attributes or {})) for span in spans.get_finished_spans()]
    assert [name for name, _ in found] == ["lmbridge.embed", "lmbridge.embed", "lmbridge.rerank"]
    assert [facts["gen_ai.operation.name"] for _, facts in found] == ["embeddings", "embeddings", "rerank"]
    assert [facts["gen_ai.usage.input_tokens"] for _, facts in found] == [2, 1, 3]


def test_what_the_engine_traces_hangs_below(
    spans: InMemorySpanExporter, scripted: Scripted, reporter: Reporter
) -> None:
    """A span that the engine opens for a request is a child of that request's own."""

    def script(request: Request) -> list[str]:
        trace.get_tracer("engine").start_span("prefill").end()
        return ["answer"]

    bridge, _ = scripted(ScriptedEngine(script))
    with bridge.client(observer=reporter) as client:
        client.infer("go", raw=True)
    inner = next(span for span in spans.get_finished_spans() if span.name == "prefill")
    assert inner.parent == only(spans).get_span_context()
    assert (only(spans).attributes or {})["gen_ai.operation.name"] == "text_completion"


def test_every_prompt_of_a_list(spans: InMemorySpanExporter, scripted: Scripted, reporter: Reporter) -> None:
    """A list's prompts are generations of their own, each with its tokens and its time."""
    bridge, _ = scripted()
    with bridge.client(observer=reporter) as client:
        answers = client.infer(["one", "two three"])
    found = {(span.attributes or {})["gen_ai.response.id"] for span in spans.get_finished_spans()}
    assert found == {answer.request_id for answer in answers}


def test_an_error(spans: InMemorySpanExporter, scripted: Scripted, reporter: Reporter) -> None:
    """A request that fails gives an error span with the error's class, and without what was sent."""
    bridge, engine = scripted()
    engine.fail("a secret", EngineError("as told"))
    with bridge.client(observer=reporter) as client, pytest.raises(EngineError):
        client.infer("a secret")
    span = only(spans)
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "EngineError"
    assert "a secret" not in span.to_json()


def test_a_reader_that_left(spans: InMemorySpanExporter, scripted: Scripted, reporter: Reporter) -> None:
    """An answer whose reader left ends its span too."""
    bridge, _ = scripted(ScriptedEngine(manual=True))
    with bridge.client(observer=reporter) as client, client.stream("one two"):
        pass
    assert (only(spans).attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, scripted: Scripted, reporter: Reporter) -> None:
    """Where opentelemetry is not installed, requests go on as ever."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    bridge, _ = scripted()
    with bridge.client(observer=reporter) as client:
        assert client.infer("one two").text == "one two"
