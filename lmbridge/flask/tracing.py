"""OpenTelemetry: one span for each generation, a child of whatever span its HTTP request has.

Rule: nothing happens where opentelemetry-api is not installed, and next to nothing where no SDK is. The attributes are
those of the semantic conventions for generative AI; no text of a prompt or an answer is among them.
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmbridge.messages import Response

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SPAN = "lmbridge.generate"


class Trace:
    """The span of one generation, from its submission to its end.

    ``with trace:`` around the submission makes it the current span there, so that what the engine traces hangs below
    it. ``end`` may come later, on another thread; the first one counts. This class itself traces nothing.
    """

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.end(error)

    def end(self, outcome: Response | BaseException | None = None) -> None:
        """Close the span with what came of it; None for an answer whose reader left it."""


class SpanTrace(Trace):
    """A ``Trace`` with a span."""

    def __init__(self, span: Span) -> None:
        self._span: Span | None = span
        self._began = time.time_ns()
        self._active: Any = None

    def __enter__(self) -> Trace:
        from opentelemetry import trace

        if self._span is not None:
            self._active = trace.use_span(self._span, end_on_exit=False, record_exception=False)
            self._active.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active is not None:
            self._active.__exit__(None, None, None)
        super().__exit__(kind, error, traceback)

    def end(self, outcome: Response | BaseException | None = None) -> None:
        span, self._span = self._span, None
        if span is None:
            return
        with contextlib.suppress(Exception):  # tracing must not fail a request
            if isinstance(outcome, Response):
                self._describe(span, outcome)
            elif outcome is not None:
                _describe_error(span, outcome)
            else:
                span.set_attribute("gen_ai.response.finish_reasons", ["abort"])
        span.end()

    def _describe(self, span: Span, response: Response) -> None:
        span.set_attribute("gen_ai.response.id", response.request_id)
        span.set_attribute("gen_ai.response.finish_reasons", [response.finish_reason])
        span.set_attribute("gen_ai.usage.input_tokens", response.usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", response.usage.completion_tokens)
        timings = response.timings
        span.add_event("lmbridge.taken_by_engine", timestamp=self._at(timings.queued))
        if timings.first_token is not None:
            span.add_event("lmbridge.first_token", timestamp=self._at(timings.first_token))

    def _at(self, seconds: float) -> int:
        return self._began + int(seconds * 1e9)


def begin(model: str, operation: str = "text_completion") -> Trace:
    """Open the span of a generation by ``model``.

    Args:
        model: the name it is served under.
        operation: as the conventions call it: ``chat`` or ``text_completion``.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        return Trace()
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "lmbridge",
        "gen_ai.request.model": model,
    }
    tracer = trace.get_tracer("lmbridge")
    return SpanTrace(tracer.start_span(SPAN, kind=trace.SpanKind.INTERNAL, attributes=attributes))


def _describe_error(span: Span, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR))  # without the message, which may quote what was sent
