"""OpenTelemetry tracing: one span per request to a bridge, a child of its HTTP request's span.

Rule: does nothing without opentelemetry-api, and next to nothing without an SDK. The attributes follow the semantic
conventions for generative AI; they contain no text of prompts or answers.
"""

from __future__ import annotations

import contextlib
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lmbridge.messages import Request, Response, Task

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SPAN = "lmbridge.generate"
SPANS: dict[Task, str] = {
    "generate": SPAN,
    "embed": "lmbridge.embed",
    "rerank": "lmbridge.rerank",
    "call": "lmbridge.call",
}


def begin(model: str, request: Request) -> None:
    """Open the span of a request, before it is sent.

    It becomes the current span in the request's own context, so that the engine's spans become its children.

    Args:
        model: the model's served name.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        return
    attributes = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": "lmbridge",
        "gen_ai.request.model": model,
    }
    began = _at(time.time_ns(), request.created - time.monotonic())
    tracer = trace.get_tracer("lmbridge")
    span = tracer.start_span(SPANS[request.task], kind=trace.SpanKind.INTERNAL, attributes=attributes, start_time=began)
    request.context.run(_enter, span, began)


def end(request: Request, outcome: Response | BaseException) -> None:
    """End the request's span with its outcome. Any thread."""
    opened = request.context.get(_opened)
    if opened is None:
        return
    span, began = opened
    with contextlib.suppress(Exception):  # tracing must not fail a request
        if isinstance(outcome, Response):
            _describe(span, began, outcome)
        else:
            _describe_error(span, outcome)
    span.end()


def _operation(request: Request) -> str:
    """The operation's name in the semantic conventions, if they have one."""
    if request.task != "generate":
        return "embeddings" if request.task == "embed" else request.task
    return "text_completion" if request.raw and isinstance(request.prompt, str) else "chat"


_opened: ContextVar[tuple[Span, int]] = ContextVar("lmbridge.span")  # in a request's context: its span and start


def _enter(span: Span, began: int) -> None:
    from opentelemetry import context, trace

    _opened.set((span, began))
    context.attach(trace.set_span_in_context(span))


def _describe(span: Span, began: int, response: Response) -> None:
    span.set_attribute("gen_ai.response.id", response.request_id)
    span.set_attribute("gen_ai.response.finish_reasons", [response.finish_reason])
    span.set_attribute("gen_ai.usage.input_tokens", response.usage.prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", response.usage.completion_tokens)
    timings = response.timings
    span.add_event("lmbridge.taken_by_engine", timestamp=_at(began, timings.queued))
    if timings.first_token is not None:
        span.add_event("lmbridge.first_token", timestamp=_at(began, timings.first_token))


def _describe_error(span: Span, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR))  # without the message, which may quote what was sent


def _at(began: int, seconds: float) -> int:
    """The time ``seconds`` after ``began``, in nanoseconds."""
    return began + int(seconds * 1e9)
