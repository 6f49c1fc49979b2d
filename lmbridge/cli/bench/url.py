"""An OpenAI-compatible server under load, through the official ``openai`` client.

Rule: the one module of the command that knows HTTP and ``openai``; it sends nothing that the API does not define.
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
    """A client that tries once.

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
    """The one model that the server has.

    Raises:
        EngineError: it cannot be asked.
        InvalidRequestError: there are several, or none.
    """
    from openai import OpenAIError

    try:
        names = [model.id for model in client.models.list()]
    except OpenAIError as cause:
        raise EngineError(f"{url}/models cannot be read ({_reason(cause)}). {_advice(cause)}") from cause
    if len(names) != 1:
        raise InvalidRequestError(f"{url} has {', '.join(names) or 'no model'}: choose with --model.", "model")
    return names[0]


def _reason(error: Exception) -> str:
    """What is at the bottom of an error: of a connection's, what the system said of it."""
    from openai import APIConnectionError

    while isinstance(error, APIConnectionError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(error) or type(error).__name__


def _advice(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return "Give the server's key with --api-key."
    if status is None:
        return "Is the server up, and the address right?"
    return "Does the URL end in /v1? If the server has no list of models, name one with --model."


class UrlTarget:
    """Asks a server over HTTP. All client threads share one pool of connections, which never makes one wait."""

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
        """Pieces count as tokens until the server has told how many there were."""
        answer = self._client.chat.completions.create(
            messages=[{"role": "user", "content": prompt}],
            stream=True,
            stream_options={"include_usage": True},
            **self._options,
        )
        with answer as chunks:  # left early, it would leave its socket open
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
    """Whether a piece carries text; servers send a reasoning model's thoughts under a name of their own."""
    return bool(delta.content or getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None))


def _note_usage(usage: Any, row: Row) -> None:
    if usage is not None:
        row.prompt_tokens, row.completion_tokens = usage.prompt_tokens, usage.completion_tokens
