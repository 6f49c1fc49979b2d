"""Translates servers' errors to ours.

Rule: pure functions; the ``openai`` library is imported inside. There are two kinds: a request that a server refused or
failed becomes one of our errors; one that it did not serve (``NotServedError``) may go to another server.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmbridge.engines.auto import shown_url
from lmbridge.engines.openai.asking import Question, our_name
from lmbridge.engines.openai.library import NO_KEY, trip_of
from lmbridge.errors import EngineError, InvalidRequestError, LMBridgeError, PromptTooLongError, QueueFullError
from lmbridge.log import said, shown

LONGEST_WAIT = 120.0
"""Seconds: if a server asks to wait for longer, the request fails instead."""
_USUAL_WAIT = 1.0
_TOO_LONG = ("maximum context length", "context_length_exceeded", "exceed_context_size", "available context size")
_MOST = re.compile(r"maximum context length is (\d+) tokens")
_LIMIT = re.compile(r"(?:maximum context length is |max_model_len=)(\d+)")
_PROMPT = re.compile(r"(\d+) (?:input tokens|in (?:the|your) (?:messages|prompt))")
_LONGEST_SAID = 86400.0
_FULL, _AWAY, _BAD_GATEWAY = (429, 529), (502, 503), 502
_FULL_CODES = ("queue_full", "rate_limit_exceeded")
_AWAY_CODES = ("engine_unavailable", "shutting_down", "aborted")
_PASSING_TYPES = ("rate_limit_error", "timeout_error", "overloaded_error")


class NotServedError(Exception):
    """The server did not serve the request. ``said`` is the reason, if known."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


class AwayError(NotServedError):
    """The server is unreachable, or cannot serve anyone.

    Attributes:
        broke: it may have started the request.
        was_old: the connection was reused, and may have been closed just as the request went out.
        answered: its response had begun.
    """

    def __init__(self, said: str, broke: bool = False, was_old: bool = False, answered: bool = False) -> None:
        super().__init__(said)
        self.broke = broke
        self.was_old = was_old
        self.answered = answered


class BusyError(NotServedError):
    """The server asks to wait for this many seconds.

    Attributes:
        ails: it is failing rather than full, and may stay so.
        broke: a backend behind it may have started the request.
    """

    def __init__(self, said: str, seconds: float, ails: bool, broke: bool = False) -> None:
        super().__init__(said)
        self.seconds = seconds
        self.ails = ails
        self.broke = broke


class UnwantedError(NotServedError):
    """The server rejects a field that we added; retry without it."""

    def __init__(self, field: str) -> None:
        super().__init__(f"it does not take {field}")
        self.field = field


class NoRoomError(NotServedError):
    """The server has less room than the default length; retry with at most this many tokens."""

    def __init__(self, said: str, tokens: int) -> None:
        super().__init__(said)
        self.tokens = tokens


class GoneError(NotServedError):
    """The server does not know the model. ``refusal`` is the caller's error if it does list the model."""

    def __init__(self, said: str, refusal: InvalidRequestError) -> None:
        super().__init__(said)
        self.refusal = refusal


@contextmanager
def in_our_words(url: str, question: Question | None = None) -> Iterator[None]:
    """Raise the client's errors as ours, or as NotServedError.

    Args:
        url: the server's URL, for messages.
    """
    import openai

    try:
        yield
    except (LMBridgeError, NotServedError):
        raise
    except openai.APIStatusError as error:
        raise _of_status(url, error, question) from _fit_to_show(error)
    except openai.APIConnectionError as error:
        raise _of_connection(error) from error
    except openai.APIError as error:  # during a stream
        raise _of_event(url, error) from _fit_to_show(error)
    except (openai.OpenAIError, OSError) as error:
        raise AwayError(said(error)) from error
    except Exception as error:
        if _is_of_transport(error):  # older clients do not wrap it during a stream
            raise AwayError(said(error), broke=True, answered=True) from error
        raise passing(f"The server {url} sent an unreadable answer: {shown(error)}. Send it again.") from error


def _is_of_transport(error: Exception) -> bool:
    """Whether it is an error of the HTTP library, which differs in older clients."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def lost(url: str, what: NotServedError) -> EngineError:
    """The error of a request whose server was lost during the answer."""
    return passing(f"The server {url} was lost during the answer ({what.said}). Send it again.", what)


def passing(message: str, cause: BaseException | None = None) -> EngineError:
    """A retryable error."""
    error = EngineError(message)
    error.retryable, error.__cause__ = True, cause
    return error


def _of_status(url: str, error: Any, question: Question | None) -> LMBridgeError | NotServedError:
    status, message = int(error.status_code), _message(error)
    if status in _FULL and error.code != "insufficient_quota":
        return _busy(url, error, message, False)
    if status in _AWAY:
        return _busy(url, error, f"status {status}: {message}", True)
    if 300 <= status < 400:
        place = shown_url(str(error.response.headers.get("location"))[:200])
        return EngineError(f"The server {url} redirects to {place}; give that URL instead.")
    if status in (401, 403):
        return EngineError(
            f"The server {url} rejected the API key (status {status}: {message}); give api_key=, or set OPENAI_API_KEY."
        )
    if status in (400, 404, 405, 413, 422):
        return _refusal(url, error, message, question)
    text = f"The server {url} failed the request (status {status}: {message})."
    return passing(f"{text} Send it again.") if status in (408, 409, 425, 504) else EngineError(text)


def _of_connection(error: Any) -> LMBridgeError | NotServedError:
    cause = error.__cause__ or error
    if isinstance(cause, LMBridgeError):  # our own error about a response
        return cause
    trip, broke = trip_of(error.request), not type(cause).__name__.startswith("Connect")
    return AwayError(said(cause), broke, was_old=broke and not trip.is_new, answered=trip.answered)


def _of_event(url: str, error: Any) -> LMBridgeError | NotServedError:
    message = _message(error)
    if error.code in _FULL_CODES:
        return BusyError(message, _USUAL_WAIT, False)
    if error.code in _AWAY_CODES:
        return BusyError(message, _USUAL_WAIT, True)
    if error.type == "invalid_request_error" or error.code == "context_length_exceeded":
        return _refusal(url, error, message, None)
    text = f"The server {url} failed the request: {message}."
    return passing(f"{text} Send it again.") if error.type in _PASSING_TYPES else EngineError(text)


def _refusal(url: str, error: Any, message: str, question: Question | None) -> LMBridgeError | NotServedError:
    param = str(error.param) if error.param else None
    named = str(param).partition(".")[0]
    if question is not None and named in question.added:
        return UnwantedError(named)
    room = 0 if question is None else _room(question, message)
    if room > 0:
        return NoRoomError(message, room)
    text = f"The server {url} refused the request: {message}."
    if any(words in f"{error.code} {error.type} {message}" for words in _TOO_LONG):
        most = _MOST.search(message)
        return PromptTooLongError(text, param="prompt", most=int(most[1]) if most else None)
    refusal = InvalidRequestError(text, param=our_name(param))
    return GoneError(message, refusal) if question is not None and _knows_no_model(error, message) else refusal


def _room(question: Question, message: str) -> int:
    """The room left, if a server refuses an answer's default length; 0 for any other refusal.

    vLLM's wording varies by version: "However, you requested 612 tokens (100 in the messages, 512 in
    the completion)", "'max_tokens' is too large: 512", "max_tokens=512 cannot be greater than max_model_len=300".
    """
    limit, prompt = _LIMIT.search(message), _PROMPT.search(message)
    refuses_length = question.room is not None and str(question.body[question.room]) in re.findall(r"\d+", message)
    return int(limit[1]) - (int(prompt[1]) if prompt else 0) if limit and refuses_length else 0


def _knows_no_model(error: Any, message: str) -> bool:
    status = getattr(error, "status_code", None)
    return error.code == "model_not_found" or (status == 404 and "model" in message.lower())


def _busy(url: str, error: Any, message: str, ails: bool) -> LMBridgeError | BusyError:
    seconds = retry_after(error.response.headers)
    if seconds > LONGEST_WAIT:
        full = QueueFullError(f"The server {url} takes no requests for {seconds:.0f} s: {message}. Send it again then.")
        full.retry_after = seconds
        return full
    return BusyError(message, seconds, ails, broke=error.status_code == _BAD_GATEWAY)


def retry_after(headers: Any) -> float:
    """The seconds a server asks to wait; the default if it gives none or an invalid value."""
    given = headers.get("retry-after") or ""
    try:
        seconds = float(given)
    except ValueError:
        seconds = _until(given)
    return min(max(seconds, 0.0), _LONGEST_SAID) if math.isfinite(seconds) else _USUAL_WAIT


def _until(date: str) -> float:
    try:
        parts = email.utils.parsedate_tz(date)
        return math.nan if parts is None else email.utils.mktime_tz(parts) - time.time()
    except (ValueError, OverflowError):  # an invalid date
        return math.nan


def _message(error: Any) -> str:
    """The server's message without full stop and API key, or ours if it has none."""
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error")
        body = inner if isinstance(inner, dict) else body
        body = body.get("message") or body.get("detail") or inner or body
    words = body if isinstance(body, str) and body.strip() else (str(body) if body else said(error))
    return _without_key(words, error).strip().rstrip(".")[:1000]


def _without_key(words: str, error: Any) -> str:
    """Remove the API key, which some servers repeat in messages."""
    key = error.request.headers.get("authorization", "").rpartition(" ")[2]
    return words if key in ("", NO_KEY) else re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "***", words)


def _fit_to_show(error: Any) -> Any:
    """The client's error as the cause, unless it contains the API key."""
    words = f"{error} {error.body}"
    return error if _without_key(words, error) == words else None
