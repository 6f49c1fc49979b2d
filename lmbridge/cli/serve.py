"""Serve models over HTTP, to OpenAI clients and to a page in the browser.

With --embed and --rerank one process serves an embedding and a reranking model
beside the language model, or alone; each has a queue of its own:

    lmbridge serve demo --embed ./minilm --rerank ./reranker

The server answers from its first second: /health and /ready say how far it is
while the model loads. SIGTERM or Ctrl-C lets running answers finish and
refuses new ones; a second signal ends at once. Keys may also be given by the
environment, where no list of processes shows them: LMBRIDGE_API_KEYS (separated
by commas) and LMBRIDGE_ADMIN_KEY.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import logging
import math
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmbridge.cli.terminal import (
    MODEL_HELP,
    add_engine_arguments,
    complain,
    engine_option,
    quiet_libraries,
    spinner,
)
from lmbridge.errors import InvalidRequestError, RequestTimeoutError

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge
    from lmbridge.flask.http_server import HttpServer
    from lmbridge.flask.models import Models
    from lmbridge.flask.serving import Front

SUMMARY = "serve models over HTTP: OpenAI's API, a page, metrics"
SPARE_THREADS = 8  # beside those for answers, so that probes and refusals are answered in any crowd
ENCODER = "encoder"  # the engine of embedding and reranking models
FILES = 16_384  # that the server may open, where the system allows so many
FLUSH = 1.0  # seconds for the last bytes of aborted answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP}; none beside --embed and --rerank")
    add_engine_arguments(parser)
    add = parser.add_argument
    add("--name", help="what clients call the model (default: as it is given)")
    add("--embed", metavar="MODEL", help="an embedding model for /v1/embeddings: a folder or a hub id")
    add("--rerank", metavar="MODEL", help="a reranking model for /v1/rerank, /v2/rerank and /rerank")
    add(
        "--encoder-option",
        metavar="NAME=VALUE",
        type=engine_option,
        action="append",
        default=[],
        help="an option of --embed and --rerank, such as device=cpu; may be given again",
    )
    add("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine only)")
    add(
        "--allowed-host",
        metavar="HOST",
        type=_host,
        action="append",
        default=[],
        help="a name that clients may call it by, besides localhost, --host and IP addresses; .example.org stands for "
        "its subdomains too, * for any; may be given again",
    )
    add("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    add(
        "--threads",
        metavar="N",
        type=_positive,
        default=512,
        help="requests at once, waiting ones included (default: 512)",
    )
    add("--api-key", metavar="KEY", action="append", default=[], help="clients must have this key; may be given again")
    add("--api-keys-file", metavar="FILE", help="a file of keys, one a line")
    add("--admin-key", metavar="KEY", help="allows POST /admin/swap with this key")
    add("--allow-remote-code", action="store_true", help="let the admin key load models that run code of their own")
    add("--max-pending", metavar="N", type=_positive, help="requests that may wait for the model (default: 1024)")
    add(
        "--max-pending-per-client",
        metavar="N",
        type=_positive,
        help="how many of them may be of one address, or one API key (default: all)",
    )
    add("--timeout", metavar="SECONDS", type=_seconds, help="the most that a request may take (default: 600)")
    add("--max-request-bytes", metavar="N", type=_positive, help="of a request's body (default: 4 MiB)")
    add("--heartbeat", metavar="SECONDS", type=_seconds, help="of silence, until a stream says something (default: 5)")
    add(
        "--drain-timeout",
        metavar="SECONDS",
        type=_seconds_or_zero,
        default=30.0,
        help="for running answers (default: 30)",
    )
    add("--cors-origin", metavar="ORIGIN", action="append", default=[], help="whose pages may ask; may be given again")
    add("--no-page", action="store_true", help="do not serve the page at /")
    add("--access-log", action="store_true", help="a line on stderr for each response")
    add("--log-prompts", action="store_true", help="log what clients ask")


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")


def _host(text: str) -> str:
    from lmbridge.flask.hosts import allowed_name

    try:
        return allowed_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds_or_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)) and float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _seconds(text: str) -> float:
    seconds = _seconds_or_zero(text)
    if not seconds:
        raise argparse.ArgumentTypeError("it must be more than 0 seconds")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    from lmbridge.flask.http_server import HttpServer
    from lmbridge.flask.models import models_of
    from lmbridge.flask.serving import AccessLog, Front, create_app

    quiet_libraries()
    log_to_stderr(arguments)
    allow_files()
    app = create_app(configuration(arguments), page=not arguments.no_page)
    models = models_of(app)
    front = Front(app.wsgi_app, arguments.threads)
    server = HttpServer(
        AccessLog(front) if arguments.access_log else front,
        arguments.host, arguments.port, arguments.threads + SPARE_THREADS, models.settings.max_request_bytes,
    )  # fmt: skip
    signals = Signals()
    try:
        server.open()
    except OSError as error:
        complain(_why_not(error, arguments))
        return 1
    if not models.settings.api_keys:
        _warn_of_strangers(arguments.host)
    try:
        loaded = _load(models, server.url, signals)
        if loaded:
            _check_kinds(arguments, models)
            print(welcome(server.url, models, page=not arguments.no_page), flush=True)
            signals.wait()
            _drain(server, front, models, arguments.drain_timeout)
    finally:
        _end(server, front, models)
    if not loaded:
        # The engine's thread may be inside torch's import or reading weights. Nothing can end it there, and the
        # interpreter's own end would wait for it, or crash under it.
        os._exit(0)
    return 0


def allow_files() -> None:
    """Let the process open as many files as it may: each connection is one, and a large body another."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """The app's ``LMBRIDGE_*`` keys; what was not given stays at its default."""
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
        # An address needs no leave, and none stands for "no check": one name must be there.
        "ALLOWED_HOSTS": [host_of(arguments.host) or "localhost", *arguments.allowed_host],
        "MAX_PENDING": max_pending,
        # All users of a proxy have one address, so that one address may have all places.
        "MAX_PENDING_PER_CLIENT": arguments.max_pending_per_client or max_pending,
        "TIMEOUT": arguments.timeout,
        "MAX_REQUEST_BYTES": arguments.max_request_bytes,
        "HEARTBEAT": arguments.heartbeat,
        "CORS_ORIGINS": arguments.cors_origin,
        "LOG_PROMPTS": arguments.log_prompts,
    }
    return {f"LMBRIDGE_{name}": value for name, value in given.items() if value}


def _sources(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each model by the name it is served under, the language model first.

    Raises:
        InvalidRequestError: two have one name, or an option is for a model that is not served.
    """
    from lmbridge.flask.config import served_name

    encoder = {"engine": ENCODER, **dict(arguments.encoder_option)}
    sources: list[tuple[str, dict[str, Any]]] = []
    if arguments.model or not (arguments.embed or arguments.rerank):
        model = arguments.model or "demo"
        source = {"model": model, "engine": arguments.engine, **dict(arguments.options)}
        sources.append((arguments.name or served_name(model), source))
    elif arguments.name:
        raise InvalidRequestError("--name is the language model's, and none is served; leave it out.")
    if arguments.encoder_option and not (arguments.embed or arguments.rerank):
        raise InvalidRequestError("--encoder-option is for --embed and --rerank; give one of them, or use --option.")
    if arguments.embed:  # what kind it is, is its own to say, so that a reranker is noticed
        sources.append((served_name(arguments.embed), {**encoder, "model": arguments.embed}))
    if arguments.rerank:
        sources.append((served_name(arguments.rerank), {**encoder, "model": arguments.rerank, "task": "rerank"}))
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            way = "give the language model another one with --name" if arguments.model else "rename one of the folders"
            raise InvalidRequestError(f"Two models would be called {name!r}; {way}.")
    return dict(sources)


def _check_kinds(arguments: argparse.Namespace, models: Models) -> None:
    """Raise InvalidRequestError where a model that was loaded does not do what it was given for."""
    from lmbridge.flask.config import served_name

    if arguments.embed and "embed" not in models.tasks(served_name(arguments.embed)):
        raise InvalidRequestError(f"{arguments.embed} is a reranking model; give it with --rerank.")
    for name in models.names():
        if not models.tasks(name) & set(_ROUTES):
            raise InvalidRequestError(
                f"{name} takes lists of items, which no route serves; a function that answers prompts yields, or needs "
                "--option task=generate."
            )


def log_to_stderr(arguments: argparse.Namespace) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("lmbridge").setLevel(logging.CRITICAL)  # while it loads, a failure is the command's own last line
    logging.getLogger("lmbridge.loading").setLevel(logging.INFO)
    if arguments.access_log:
        logging.getLogger("lmbridge.access").setLevel(logging.INFO)
    if arguments.log_prompts:
        logging.getLogger("lmbridge.flask.openai").setLevel(logging.INFO)


def _why_not(error: OSError, arguments: argparse.Namespace) -> str:
    where = f"{arguments.host}, port {arguments.port}"
    if os.strerror(errno.EADDRINUSE) in str(error):
        return f"{where}: another program listens there already; choose another one with --port."
    return f"{where}: {error}"


def _warn_of_strangers(host: str) -> None:
    from lmbridge.flask.hosts import is_loopback

    if not is_loopback(host):
        complain(
            f"there is no API key, so that whoever reaches {host or 'this machine'} may use the models: set "
            "LMBRIDGE_API_KEYS or give --api-keys-file FILE, or leave --host out to serve this machine only."
        )


def welcome(url: str, models: Models, page: bool) -> str:
    """What a newcomer needs: how to ask each model with curl and from Python, and the page."""
    names = models.names()
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    lines = [f"{listed} {'is' if len(names) == 1 else 'are'} ready; Ctrl-C ends it."]
    for name in names:
        for task in sorted(models.tasks(name), key=list(_ROUTES).index):
            lines += [f"  curl:   {_curl(url, task, name, models)}", f"  {_python(url, task, name, models)}"]
    if page:
        lines.append(f"  page:   {url}/")
    return "\n".join(lines)


_ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    ),
    "embed": ("/v1/embeddings", {"input": ["A red fox.", "A brown dog."]}),
    "rerank": ("/v1/rerank", {"query": "Which animal is red?", "documents": ["A brown dog.", "A red fox."]}),
}


def _curl(url: str, task: str, name: str, models: Models) -> str:
    route, body = _ROUTES[task]
    key = ' -H "Authorization: Bearer $KEY"' if models.settings.api_keys else ""
    return f"curl {url}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps({'model': name, **body})}'"


def _python(url: str, task: str, name: str, models: Models) -> str:
    key = "KEY" if models.settings.api_keys else '"none"'
    openai = f'openai: OpenAI(base_url="{url}/v1", api_key={key})'
    if task == "generate":
        return f'{openai}  # and model="{name}" in its calls'
    if task == "embed":
        return f'{openai}.embeddings.create(model="{name}", input=["A red fox."])'
    return f'cohere: cohere.ClientV2({key}, base_url="{url}").rerank(model="{name}", query="…", documents=["…"])'


# --- from start to end ---


def _load(models: Models, url: str, signals: Signals) -> bool:
    """Load every model; False when a signal came first.

    Raises:
        LMBridgeError: one could not be loaded.
    """
    names = ", ".join(models.names())
    print(f"Listening on {url}, and loading {names}", flush=True)
    with _progress(f"Loading {names}"):
        for name in models.names():
            while not _is_loaded(models.bridge(name)):
                if signals.came:
                    return False
    logging.getLogger("lmbridge").setLevel(logging.WARNING)
    return True


def _is_loaded(bridge: Bridge) -> bool:
    try:
        bridge.start(timeout=0.2)
    except RequestTimeoutError:
        return False
    return True


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would overwrite the spinner
    with spinner(text):
        yield


def _drain(server: HttpServer, front: Front, models: Models, timeout: float) -> None:
    """Refuse what is new, and let what runs finish."""
    server.closing = models.draining = True
    if front.inside:
        print(f"Answers that are finishing: {front.inside}, for {timeout:g} s at most; a second signal ends at once.")
        sys.stdout.flush()
    end = time.monotonic() + timeout
    if front.wait_until_empty(timeout):
        server.wait_until_sent(end - time.monotonic())
    else:
        print(f"Answers that were not finished and are aborted: {front.inside}", flush=True)


def _end(server: HttpServer, front: Front, models: Models) -> None:
    """Abort what is left, and give each part a bounded time to end."""
    # Engines collect garbage as they close, and so does the interpreter at its own end. Each time is 0.2 s with what
    # torch and transformers keep, and this process needs none of it any more.
    gc.freeze()
    server.closing = models.draining = True
    closing = threading.Thread(target=models.close, kwargs={"timeout": 0.0}, daemon=True)
    closing.start()
    front.wait_until_empty(FLUSH)
    server.close()
    closing.join(FLUSH)


class Signals:
    """SIGTERM and Ctrl-C: the first is kept to be looked at, the second ends the process at once."""

    def __init__(self) -> None:
        self.came = False
        self._first: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be put to by what interrupts its own get
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Return when the first has come."""
        self._first.get()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True
        self._first.put(number)
