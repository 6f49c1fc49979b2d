"""Puts an OpenAI-compatible server under load, through the official ``openai`` client.

Rule: the one module of the command that knows HTTP and ``openai``; it sends only what the API defines.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from lmbridge.cli.bench.load import Ask, Row
from lmbridge.cli.terminal import one_line
from lmbridge.errors import EngineError, InvalidRequestError, MissingDependencyError

if TYPE_CHECKING:
    from openai import OpenAI


def open_client(url: str, api_key: str | None, timeout: float) -> OpenAI:
    """A client that never retries.

    Raises:
        MissingDependencyError: openai is not installed.
    """
    try:
        from openai import OpenAI
    except ImportError as cause:
        raise MissingDependencyError(
            f'--url needs the openai package ({cause}); install it with: pip install "lmbridge[bench]"'
        ) from cause
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)


def find_model(client: OpenAI, url: str) -> str:
    """The name of the server's only model.

    Raises:
        EngineError: its list of models cannot be read.
        InvalidRequestError: it has several models, or none.
    """
    from openai import OpenAIError

    try:
        names = [model.id for model in client.models.list()]
    except OpenAIError as cause:
        raise EngineError(f"Reading {url}/models failed ({_reason(cause)}). {_advice(cause)}") from cause
    if len(names) != 1:
        found = f"the models {', '.join(names)}; choose one" if names else "no models; name one"
        raise InvalidRequestError(f"{url} lists {found} with --model.", "model")
    return names[0]


def _reason(error: Exception) -> str:
    """An error's message; for a failed connection, that of the underlying error."""
    from openai import APIConnectionError

    while isinstance(error, APIConnectionError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(error) or type(error).__name__


def _advice(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return "Give the server's key with --api-key."
    if status is None:
        return "Check that the server is running and that the address is right."
    return "Check that the URL ends in /v1. If the server does not list its models, name one with --model."


class UrlTarget:
    """Sends prompts over HTTP. All client threads share one connection pool, which is large enough for all."""

    def __init__(self, client: OpenAI, model: str, max_new_tokens: int, stream: bool) -> None:
        self._client = client
        self._options: dict[str, Any] = {"model": model, "max_tokens": max_new_tokens}
        self._stream = stream
        self._stopping = threading.Event()

    def connect(self, client: int) -> Ask:
        return self._read if self._stream else self._wait

    def stop(self) -> None:
        self._stopping.set()

    def kind(self, error: BaseException) -> str:
        status = getattr(error, "status_code", None)
        return type(error).__name__ if status is None else f"{status} {type(error).__name__}"

    def _read(self, prompt: str, row: Row) -> None:
        """Stream the answer; pieces count as tokens until the server reports the usage."""
        answer = self._client.chat.completions.create(
            messages=[{"role": "user", "content": prompt}],
            stream=True,
            stream_options={"include_usage": True},
            **self._options,
        )
        with answer as chunks:  # else leaving early would leak its socket
            for chunk in chunks:
                if self._stopping.is_set():
                    raise InterruptedError
                if chunk.choices:
                    row.grew(_has_text(chunk.choices[0].delta))
                    row.finish_reason = chunk.choices[0].finish_reason or row.finish_reason
                _note_usage(chunk.usage, row)
        if row.finish_reason is None:
            raise EngineError("The server ended the stream without a finish_reason.")

    def _wait(self, prompt: str, row: Row) -> None:
        answer = self._client.chat.completions.create(
            messages=[{"role": "user", "content": prompt}], stream=False, **self._options
        )
        row.finish_reason = answer.choices[0].finish_reason
        _note_usage(answer.usage, row)


def _has_text(delta: Any) -> bool:
    """Whether a piece carries text; servers use different fields for a model's reasoning."""
    return bool(delta.content or getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None))


def _note_usage(usage: Any, row: Row) -> None:
    if usage is not None:
        row.prompt_tokens, row.completion_tokens = usage.prompt_tokens, usage.completion_tokens
