"""OpenTelemetry: what the span of a generation says, and that none is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lmbridge import Bridge, EngineError, Request
from lmbridge.flask import tracing
from lmbridge.testing import ScriptedEngine

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


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == tracing.SPAN]
    return span


def test_an_answer(spans: InMemorySpanExporter, scripted: Scripted) -> None:
    """The span is a child of the HTTP request's, names model, tokens and finish reason, and says when what happened."""
    bridge, _ = scripted()
    http = trace.get_tracer("test").start_span("POST /ask")
    with trace.use_span(http, end_on_exit=True):
        opened = tracing.begin("demo", "chat")
    with opened:
        stream = bridge.stream("one two three")
    for _ in stream:
        pass
    opened.end(stream.response)
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


def test_what_the_engine_traces_hangs_below(spans: InMemorySpanExporter, scripted: Scripted) -> None:
    """A span that the engine opens for a request is a child of that request's own."""

    def script(request: Request) -> list[str]:
        trace.get_tracer("engine").start_span("prefill").end()
        return ["answer"]

    bridge, _ = scripted(ScriptedEngine(script))
    opened = tracing.begin("demo")
    with opened:
        answer = bridge.infer("go")
    opened.end(answer)
    inner = next(span for span in spans.get_finished_spans() if span.name == "prefill")
    assert inner.parent == only(spans).get_span_context()


def test_an_error(spans: InMemorySpanExporter, scripted: Scripted) -> None:
    """A request that fails gives an error span with the error's class, and without what was sent."""
    bridge, engine = scripted()
    engine.fail("a secret", EngineError("as told"))
    opened = tracing.begin("demo")
    with pytest.raises(EngineError), opened:
        bridge.infer("a secret")
    opened.end()  # whoever ends it once more changes nothing
    span = only(spans)
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "EngineError"
    assert "a secret" not in span.to_json()


def test_a_reader_that_left(spans: InMemorySpanExporter) -> None:
    """An answer whose reader left ends its span too."""
    tracing.begin("demo").end()
    assert (only(spans).attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, scripted: Scripted) -> None:
    """Where opentelemetry is not installed, requests go on as ever."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    bridge, _ = scripted()
    with tracing.begin("demo") as opened:
        answer = bridge.infer("one two")
    opened.end(answer)
    assert answer.text == "one two"
