"""Reads the keys ``LMBRIDGE_*`` of an app's configuration.

Rule: ``init_app`` makes ``Settings`` from ``app.config`` once; its errors name the invalid key. The table ``KEYS`` is
also the documentation: docs/http/flask.rst includes it.
"""

from __future__ import annotations

import difflib
import math
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from lmbridge.bridge import Bridge, Model
from lmbridge.engines.auto import is_url
from lmbridge.engines.base import Engine
from lmbridge.errors import InvalidRequestError
from lmbridge.flask.hosts import allowed_name

ModelSource = Model | Mapping[str, Any] | Bridge
"""The source of a served model: what a Bridge takes, ``{"model": …, "engine": …, option: value}``, or a Bridge."""


@dataclass(frozen=True)
class Settings:
    """An app's settings; ``KEYS`` describes each key."""

    models: Mapping[str, ModelSource]
    preload: bool = False
    timeout: float | None = 600.0
    max_pending: int = 1024
    max_pending_per_client: int = 256
    when_full: Literal["block", "reject"] = "reject"
    stall_timeout: float | None = 300.0
    heartbeat: float = 5.0
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    allow_remote_code: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_request_bytes: int = 4 * 1024 * 1024
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read and check the settings in ``config``.

        Raises:
            InvalidRequestError: a key is unknown, or its value is invalid; ``param`` is the key.
        """
        given = {key: value for key, value in config.items() if key.startswith("LMBRIDGE_")}
        for key in given:
            if key not in KEYS:
                _refuse_unknown(key)
        values = {key: _checked(key, given.get(key, KEYS[key].default)) for key in KEYS}
        return cls(
            models=_models(values),
            api_keys=(*values["LMBRIDGE_API_KEYS"], *_keys_of_file(values["LMBRIDGE_API_KEYS_FILE"])),
            **{key.removeprefix("LMBRIDGE_").lower(): values[key] for key in _AS_THEY_ARE},
        )


@dataclass(frozen=True)
class Key:
    """One key: its default, the function that reads a value (an error: invalid), what is expected, and its meaning."""

    default: Any
    read: Callable[[Any], Any]
    expected: str
    meaning: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(text.strip() for text in map(_text, parts) if text.strip()) if parts else ()


def _hosts(value: Any) -> tuple[str, ...]:
    return tuple(map(allowed_name, _texts(value)))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError
    return int(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError
    return float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return value


def _choice(value: Any) -> str:
    if value not in ("block", "reject"):
        raise ValueError
    return str(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _model(value: Any) -> Any:
    if isinstance(value, (Bridge, Engine)) or callable(value):
        return value
    return _text(str(value) if isinstance(value, Path) else value)


KEYS: dict[str, Key] = {
    "LMBRIDGE_MODEL": Key(
        None,
        _optional(_model),
        "a model's name or folder, an Engine, a function that builds one, or a Bridge",
        "The model: ``demo``, a folder, a hub id, an Engine, a function that builds one (``function_engine(…)``), or a "
        "Bridge of your own, which you close yourself.",
    ),
    "LMBRIDGE_ENGINE": Key("auto", _text, "an engine's name", "The engine that runs ``LMBRIDGE_MODEL``."),
    "LMBRIDGE_ENGINE_OPTIONS": Key({}, _mapping, "a dict of options", "The engine's own options."),
    "LMBRIDGE_MODELS": Key(
        None,
        _optional(_mapping),
        "a dict of names to models",
        "Several models instead of one: a name maps to a model, to ``{'model': …, 'engine': …, option: value}`` or to "
        "a Bridge. The first of each kind is the default.",
    ),
    "LMBRIDGE_PRELOAD": Key(
        False,
        _flag,
        "True or False",
        "Load all models when the serving process starts, not at the first request. Works under gunicorn (with its "
        "``--preload`` too), ``waitress-serve`` and ``flask run``; elsewhere call ``lm.preload(app)``.",
    ),
    "LMBRIDGE_TIMEOUT": Key(
        600.0,
        _optional(_seconds),
        "seconds > 0 or None",
        "Default and maximum of a request's timeout, in seconds.",
    ),
    "LMBRIDGE_MAX_PENDING": Key(1024, _count, "an int >= 1", "How many requests may wait for a model."),
    "LMBRIDGE_MAX_PENDING_PER_CLIENT": Key(256, _count, "an int >= 1", "How many of them may belong to one account."),
    "LMBRIDGE_WHEN_FULL": Key(
        "reject",
        _choice,
        "'block' or 'reject'",
        "``reject`` answers 429 when the queue is full; with ``block`` the request waits for room.",
    ),
    "LMBRIDGE_STALL_TIMEOUT": Key(
        300.0,
        _optional(_seconds),
        "seconds > 0 or None",
        "Restart an engine that has work but produces nothing for this many seconds.",
    ),
    "LMBRIDGE_HEARTBEAT": Key(
        5.0, _seconds, "seconds > 0", "After this many seconds of silence, a stream sends a comment to stay open."
    ),
    "LMBRIDGE_API_KEYS": Key(
        (),
        _texts,
        "a list of strings, or one string with commas",
        "The keys that the ready-made routes accept; none: everybody who can connect may use them.",
    ),
    "LMBRIDGE_API_KEYS_FILE": Key(
        None, _optional(str), "a file's path", "A file of more API keys, one per line; # begins a comment line."
    ),
    "LMBRIDGE_ADMIN_KEY": Key(None, _optional(_text), "a string", "The key for swapping models; none: nobody may."),
    "LMBRIDGE_ALLOW_REMOTE_CODE": Key(
        False, _flag, "True or False", "Let the admin key load models that run their own code."
    ),
    "LMBRIDGE_ALLOWED_HOSTS": Key(
        (),
        _hosts,
        "a list of host names, such as 'lm.example.org', '.example.org' or '*'",
        "The host names by which requests may address the server, besides localhost and IP addresses: ``.example.org`` "
        "includes its subdomains, ``*`` allows any; none: no check.",
    ),
    "LMBRIDGE_MAX_REQUEST_BYTES": Key(4 * 1024 * 1024, _count, "an int >= 1", "The largest accepted request body."),
    "LMBRIDGE_CORS_ORIGINS": Key(
        (),
        _texts,
        "a list of origins, or '*'",
        "The origins whose pages may use the ready-made routes; none: only the server's own.",
    ),
    "LMBRIDGE_LOG_PROMPTS": Key(False, _flag, "True or False", "Write prompts to the log."),
}

_AS_THEY_ARE = (
    "LMBRIDGE_PRELOAD", "LMBRIDGE_TIMEOUT", "LMBRIDGE_MAX_PENDING", "LMBRIDGE_MAX_PENDING_PER_CLIENT",
    "LMBRIDGE_WHEN_FULL", "LMBRIDGE_STALL_TIMEOUT", "LMBRIDGE_HEARTBEAT", "LMBRIDGE_ADMIN_KEY",
    "LMBRIDGE_ALLOW_REMOTE_CODE", "LMBRIDGE_ALLOWED_HOSTS", "LMBRIDGE_MAX_REQUEST_BYTES", "LMBRIDGE_CORS_ORIGINS",
    "LMBRIDGE_LOG_PROMPTS",
)  # fmt: skip


def _refuse_unknown(key: str) -> NoReturn:
    near = difflib.get_close_matches(key, KEYS, 1)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}."
    raise InvalidRequestError(f"Unknown configuration key {key}; {hint}", key)


def _checked(key: str, value: Any) -> Any:
    try:
        return KEYS[key].read(value)
    except (ValueError, TypeError, OverflowError):
        raise InvalidRequestError(f"{key} must be {KEYS[key].expected}, not {value!r:.80}.", key) from None


def _models(values: Mapping[str, Any]) -> Mapping[str, ModelSource]:
    one, several = values["LMBRIDGE_MODEL"], values["LMBRIDGE_MODELS"]
    if (one is None) == (not several):
        raise InvalidRequestError(
            "Set either LMBRIDGE_MODEL, such as app.config['LMBRIDGE_MODEL'] = 'demo', or, for several models, "
            "LMBRIDGE_MODELS.",
            "LMBRIDGE_MODEL",
        )
    if several:
        return dict(several)
    if isinstance(one, Bridge):
        return {"default": one}
    name = served_name(one) if isinstance(one, str) else "default"
    source = {"model": one, "engine": values["LMBRIDGE_ENGINE"], **values["LMBRIDGE_ENGINE_OPTIONS"]}
    return {name: source}


def served_name(model: str) -> str:
    """A model's name for clients: a folder's last part, a URL's host; a hub id or "demo" unchanged."""
    if is_url(model):
        return urllib.parse.urlsplit(model.partition(",")[0]).netloc.rpartition("@")[2] or model
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")
    return Path(model).name or model if is_path else model


def _keys_of_file(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"LMBRIDGE_API_KEYS_FILE: {path} cannot be read: {error}.", "LMBRIDGE_API_KEYS_FILE"
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:  # an empty file must not let everybody in
        raise InvalidRequestError(f"LMBRIDGE_API_KEYS_FILE: {path} contains no key.", "LMBRIDGE_API_KEYS_FILE")
    return keys
