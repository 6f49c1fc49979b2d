"""Makes the app's configuration from the command line.

Rule: refuses arguments that contradict each other, before anything is loaded.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from lmbridge.cli.parser import UsageError
from lmbridge.cli.serve.welcome import ROUTES
from lmbridge.errors import InvalidRequestError

if TYPE_CHECKING:
    from lmbridge.flask.models import Models

ENCODER = "encoder"  # the engine of embedding and reranking models


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """The app's ``LMBRIDGE_*`` keys; omitted arguments keep their defaults."""
    from lmbridge.flask.config import KEYS
    from lmbridge.flask.hosts import host_of

    keys = arguments.api_key or os.environ.get("LMBRIDGE_API_KEYS")
    max_pending = arguments.max_pending or KEYS["LMBRIDGE_MAX_PENDING"].default
    given = {
        "MODELS": _sources(arguments),
        "API_KEYS": keys,
        "API_KEYS_FILE": arguments.api_keys_file,
        "ADMIN_KEY": arguments.admin_key or os.environ.get("LMBRIDGE_ADMIN_KEY"),
        "ALLOW_REMOTE_CODE": arguments.allow_remote_code,
        # IP addresses are always allowed, and an empty list means "no check": there must be one name.
        "ALLOWED_HOSTS": [host_of(arguments.host) or "localhost", *arguments.allowed_host],
        "MAX_PENDING": max_pending,
        # All users behind a proxy share one address, so one address may take all places.
        "MAX_PENDING_PER_CLIENT": arguments.max_pending_per_client or max_pending,
        "TIMEOUT": arguments.timeout,
        "MAX_REQUEST_BYTES": arguments.max_request_bytes,
        "HEARTBEAT": arguments.heartbeat,
        "CORS_ORIGINS": arguments.cors_origin,
        "LOG_PROMPTS": arguments.log_prompts,
    }
    return {f"LMBRIDGE_{name}": value for name, value in given.items() if value}


def _sources(arguments: argparse.Namespace) -> dict[str, Any]:
    """The models by their served names, the language model first.

    Raises:
        UsageError: two models have the same name, or an option is for a model that is not served.
    """
    from lmbridge.flask.config import served_name

    encoder = {"engine": ENCODER, **dict(arguments.encoder_option)}
    sources: list[tuple[str, dict[str, Any]]] = []
    if arguments.model or not (arguments.embed or arguments.rerank):
        model = arguments.model or "demo"
        source = {"model": model, "engine": arguments.engine, **dict(arguments.options)}
        sources.append((arguments.name or served_name(model), source))
    elif arguments.name:
        raise UsageError("--name is for a language model, and none is served; leave it out")
    if arguments.encoder_option and not (arguments.embed or arguments.rerank):
        raise UsageError("--encoder-option is for --embed and --rerank; give one of them, or use --option")
    if arguments.embed:  # without a task, so that check_kinds notices a reranker
        sources.append((served_name(arguments.embed), {**encoder, "model": arguments.embed}))
    if arguments.rerank:
        sources.append((served_name(arguments.rerank), {**encoder, "model": arguments.rerank, "task": "rerank"}))
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            way = "rename the language model with --name" if arguments.model else "rename one of the folders"
            raise UsageError(f"two models would be named {name!r}; {way}")
    return dict(sources)


def check_kinds(arguments: argparse.Namespace, models: Models) -> None:
    """Raise InvalidRequestError if a loaded model does not support the task it was given for."""
    from lmbridge.flask.config import served_name

    if arguments.embed and "embed" not in models.tasks(served_name(arguments.embed)):
        raise InvalidRequestError(f"{arguments.embed} is a reranking model; give it with --rerank.")
    for name in models.names():
        if not models.tasks(name) & set(ROUTES):
            raise InvalidRequestError(
                f"{name} is a function over lists of items, which no route serves; to answer prompts, it must yield or "
                "be given --option task=generate."
            )
