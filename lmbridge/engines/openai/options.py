"""The engine's options, validated when it is created: the servers, the model there, and their flavour.

Rule: standard library only, any thread; contacts no server.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from lmbridge.engines.auto import is_url, shown_url
from lmbridge.engines.openai.flavours import FLAVOURS
from lmbridge.errors import InvalidRequestError
from lmbridge.log import shown
from lmbridge.messages import Task
from lmbridge.values import as_int, as_list

OPENAI = "https://api.openai.com/v1"
MOST_AT_ONCE = 1000
"""The client's connection limit."""
_PER_SERVER = 64
_ROUTES = ("/chat/completions", "/completions", "/embeddings", "/models", "/rerank", "/responses")
_TASKS: dict[str, frozenset[Task]] = {name: frozenset({name}) for name in ("generate", "embed", "rerank")}


@dataclass(frozen=True)
class OpenAIOptions:
    """An engine's options; the engine class documents each.

    Attributes:
        urls: at least one, without logins.
        logins: per URL, the header for its user and password; never shown.
        model: its name on the servers; None: what each serves.
        tasks: its tasks; None: as the servers report.
        api_key: the one given, or the environment's; never shown.
    """

    urls: tuple[str, ...]
    model: str | None
    flavour: str | None
    tasks: frozenset[Task] | None
    max_batch_size: int
    extra_body: Mapping[str, Any]
    api_key: str | None = field(repr=False)
    logins: Mapping[str, str] = field(repr=False)


def read_options(
    model: Any, base_url: Any, model_name: Any, api_key: Any, flavour: Any, task: Any, max_batch_size: Any, extra: Any
) -> OpenAIOptions:
    """The options, validated and plain.

    Raises:
        InvalidRequestError: one is invalid; ``param`` names it.
    """
    urls, model_name = _places(str(model), base_url, model_name)
    if model_name is not None and (not isinstance(model_name, str) or not model_name):
        raise InvalidRequestError("model_name must be a non-empty string, or None.", "model_name")
    if flavour is not None and flavour not in FLAVOURS:
        raise _wrong("flavour", f"one of {', '.join(FLAVOURS)}, or None", flavour)
    if task != "auto" and task not in _TASKS:
        raise _wrong("task", f"one of auto, {', '.join(_TASKS)}", task)
    size = _PER_SERVER * len(urls) if max_batch_size is None else as_int(max_batch_size)
    if size is None or size < 1 or (max_batch_size is not None and size > MOST_AT_ONCE):
        raise _wrong("max_batch_size", f"an int from 1 to {MOST_AT_ONCE}", max_batch_size)
    return OpenAIOptions(
        tuple(dict.fromkeys(map(shown_url, urls))),
        model_name,
        flavour,
        _TASKS.get(task),
        min(size, MOST_AT_ONCE),
        _extra_body(extra),
        _key(api_key),
        {shown_url(url): login for url in urls if (login := _login(url))},
    )


def _key(given: Any) -> str | None:
    """The key, valid for a header; one read from a file may end with a newline."""
    name, key = ("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY")) if given is None else ("api_key", given)
    if given is None and not key:
        return None
    key = key.strip() if isinstance(key, str) else ""
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidRequestError(f"{name} must be printable ASCII, or left out.", "api_key")
    return key


def _login(url: str) -> str:
    """The header for the user and the password in a URL; "" where there are none."""
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""


def _places(model: str, base_url: Any, model_name: Any) -> tuple[tuple[str, ...], Any]:
    """The servers, and the model's name there; ``model`` may be either."""
    if is_url(model):
        if base_url is not None:
            raise InvalidRequestError("The model is already a URL; leave base_url out.", "base_url")
        return _urls(model, "model"), model_name
    if model_name not in (None, model):
        raise InvalidRequestError(f"The model is already named {model!r}; leave model_name out.", "model_name")
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI
    return _urls(base_url, "base_url"), model


def _urls(given: Any, param: str) -> tuple[str, ...]:
    listed = given.split(",") if isinstance(given, str) else as_list(given)
    if not listed or not all(isinstance(url, str) for url in listed):
        raise _wrong(param, "a URL or a list of URLs", given)
    return tuple(dict.fromkeys(_checked_url(url.strip(), param, given) for url in listed))


def _checked_url(url: str, param: str, given: Any) -> str:
    """The validated URL; the default path is ``/v1``: ``http://host:8000`` is ``http://host:8000/v1``."""
    try:
        parts = urlsplit(url)
        good = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        # Hides the whole value: a part may hold half of a password containing a comma.
        raise _wrong(param, 'a URL such as "http://host:8000/v1"', given)
    url = url.rstrip("/")
    end = next((route for route in _ROUTES if url.endswith(route)), None)
    if end is not None:
        raise InvalidRequestError(f"{param} must be a base URL: remove {end} from {shown_url(url)!r}.", param)
    return url + ("" if parts.path.strip("/") else "/v1")


def _extra_body(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    try:
        plain = json.loads(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise _wrong("extra_body", "a dict that JSON can hold, or None", value)
    return plain


def _wrong(name: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, not {shown_url(shown(value))}.", name)
