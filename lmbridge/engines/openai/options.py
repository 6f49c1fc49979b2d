"""The engine's options, checked when it is made: which servers, which model there, and in whose words.

Rule: standard library only, any thread; nobody is asked here.
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
"""Requests that the client has connections for."""
_PER_SERVER = 64
_ROUTES = ("/chat/completions", "/completions", "/embeddings", "/models", "/rerank", "/responses")
_TASKS: dict[str, frozenset[Task]] = {name: frozenset({name}) for name in ("generate", "embed", "rerank")}


@dataclass(frozen=True)
class OpenAIOptions:
    """What an engine was asked for; its own docstring says what each means.

    Attributes:
        urls: at least one, without logins.
        logins: by a URL, the header that stands for the user and the password in it; never shown.
        model: as the servers call it; None: what each serves.
        tasks: what it does; None: what the servers say.
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
    """The options, plain and checked.

    Raises:
        InvalidRequestError: one is wrong; ``param`` names it.
    """
    urls, model_name = _places(str(model), base_url, model_name)
    if model_name is not None and (not isinstance(model_name, str) or not model_name):
        raise InvalidRequestError("model_name must be a string that is not empty, or None.", "model_name")
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
    """What a header can hold; a key read from a file may end with a line's end."""
    name, key = ("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY")) if given is None else ("api_key", given)
    if given is None and not key:
        return None
    key = key.strip() if isinstance(key, str) else ""
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidRequestError(f"{name} must be a string of printable ASCII, or not be given.", "api_key")
    return key


def _login(url: str) -> str:
    """The header for the user and the password in a URL; "" where there are none."""
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""


def _places(model: str, base_url: Any, model_name: Any) -> tuple[tuple[str, ...], Any]:
    """The servers, and the model's name there. The model itself is either of the two."""
    if is_url(model):
        if base_url is not None:
            raise InvalidRequestError("The model is a URL already; leave base_url out, or put it there.", "base_url")
        return _urls(model, "model"), model_name
    if model_name not in (None, model):
        raise InvalidRequestError(f"The model is named {model!r} already; leave model_name out.", "model_name")
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI
    return _urls(base_url, "base_url"), model


def _urls(given: Any, param: str) -> tuple[str, ...]:
    listed = given.split(",") if isinstance(given, str) else as_list(given)
    if not listed or not all(isinstance(url, str) for url in listed):
        raise _wrong(param, "a URL or a list of URLs", given)
    return tuple(dict.fromkeys(_checked_url(url.strip(), param, given) for url in listed))


def _checked_url(url: str, param: str, given: Any) -> str:
    """A URL without a path means the usual one: ``http://host:8000`` is ``http://host:8000/v1``."""
    try:
        parts = urlsplit(url)
        good = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        # All that was given: a part may hold half of a password with a comma in it.
        raise _wrong(param, 'a URL such as "http://host:8000/v1"', given)
    url = url.rstrip("/")
    end = next((route for route in _ROUTES if url.endswith(route)), None)
    if end is not None:
        raise InvalidRequestError(f"{param} is one route of the server: leave {end} off {shown_url(url)!r}.", param)
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
