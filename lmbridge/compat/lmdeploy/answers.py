"""The Bridge's answers, deltas and errors as LMDeploy's Responses.

Rule: pure functions and one counter. A request's own failure is a Response with ``finish_reason="error"``, as in
LMDeploy, so that a list keeps its other answers; anything else that ends the wait is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from lmbridge import messages
from lmbridge.compat.lmdeploy.messages import Response
from lmbridge.errors import (
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    PromptTooLongError,
    RequestAbortedError,
    UnsupportedOptionError,
)

_CODES: tuple[tuple[type[LMBridgeError], str], ...] = (
    (PromptTooLongError, "context_length_exceeded"),
    (UnsupportedOptionError, "unsupported_feature"),
    (InvalidRequestError, "invalid_request"),
    (EngineDeadError, "engine_unavailable"),
    (EngineStartError, "engine_unavailable"),
    (EngineError, "internal_error"),
)


def whole(response: messages.Response, index: int = 0) -> Response:
    """A complete answer."""
    return Response(
        text=response.text,
        generate_token_len=len(response.token_ids),
        input_token_len=response.usage.prompt_tokens,
        finish_reason=_reason(response.finish_reason),
        token_ids=response.token_ids,
        logprobs=response.logprobs,
        index=index,
        **_beside(response.value),
    )


def _beside(value: object) -> dict[str, Any]:
    """What LMDeploy's engine returns besides tokens, by field name."""
    return value if isinstance(value, dict) else {}


def _reason(reason: messages.FinishReason) -> Literal["stop", "length", "error", "abort"]:
    """LMDeploy reports tool calls as ``stop``."""
    return "stop" if reason == "tool_calls" else reason


def answer(result: messages.Response | BaseException, index: int = 0) -> Response:
    """The result of a request; raises as ``failed`` does."""
    if isinstance(result, messages.Response):
        return whole(result, index)
    if isinstance(result, LMBridgeError):
        return failed(result, index)
    raise result


def failed(error: LMBridgeError, index: int = 0) -> Response:
    """A request's own failure as a Response, with its partial text; raises any other error."""
    if isinstance(error, RequestAbortedError):
        return Response(error.partial, 0, 0, "abort", index=index)
    for kind, code in _CODES:
        if isinstance(error, kind):
            text = error.partial
            return Response(text, 0, 0, "error", index=index, error_code=code, error_message=str(error))
    error.index = index
    raise error


class Parts:
    """One answer's parts: added text, and a last part with the end."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._tokens = 0
        self._prompt_tokens = 0  # until they are known

    def of(self, delta: messages.Delta) -> Iterator[Response]:
        """A delta's new text, if any, and after the last delta the end.

        Raises:
            LMBridgeError: it ended for a reason other than the request's own failure.
        """
        if delta.prompt_token_ids is not None:
            self._prompt_tokens = len(delta.prompt_token_ids)
        if delta.text or delta.token_ids:
            self._tokens += len(delta.token_ids)
            yield Response(
                delta.text, self._tokens, self._prompt_tokens, None, delta.token_ids, delta.logprobs, index=self._index
            )
        if delta.error is not None:
            yield self.error(delta.error)
        elif delta.finish_reason is not None:
            prompt_tokens = self._prompt_tokens if delta.usage is None else delta.usage.prompt_tokens
            reason = _reason(delta.finish_reason)
            yield Response("", self._tokens, prompt_tokens, reason, index=self._index, **_beside(delta.value))

    def error(self, error: LMBridgeError) -> Response:
        """As ``failed``, without the text, which was already returned."""
        last = failed(error, self._index)
        last.text, last.generate_token_len, last.input_token_len = "", self._tokens, self._prompt_tokens
        return last
