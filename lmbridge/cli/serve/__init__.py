"""Serve models over HTTP: OpenAI's API and a web page.

The server responds at once: while the model loads, /health and /ready report
progress. On SIGTERM or Ctrl-C it refuses new requests and lets running answers
finish; a second signal ends it at once.

With --embed and --rerank, the same process serves an embedding and a reranking
model, alone or beside the language model, each with its own queue.

Prefer LMBRIDGE_API_KEYS (separated by commas) and LMBRIDGE_ADMIN_KEY to
--api-key and --admin-key: every user of the machine can see a command line.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING

from lmbridge.cli.serve.arguments import add_arguments
from lmbridge.cli.serve.configuration import check_kinds, configuration
from lmbridge.cli.serve.ending import Signals, drain, end
from lmbridge.cli.serve.port import allow_files, opened, warn_of_strangers
from lmbridge.cli.serve.welcome import welcome
from lmbridge.cli.terminal import LogFormatter, quiet_libraries, spinner
from lmbridge.errors import RequestTimeoutError

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge
    from lmbridge.flask.models import Models

__all__ = ["EXAMPLES", "SUMMARY", "USAGE", "add_arguments", "run"]

SUMMARY = "serve models over HTTP: OpenAI's API, a web page, metrics"
USAGE = "[OPTION ...] [MODEL]"
EXAMPLES = """\
  lmbridge serve
  lmbridge serve ./my-model --name my-model --port 8080
  lmbridge serve demo --embed ./minilm --rerank ./reranker
  LMBRIDGE_API_KEYS=secret lmbridge serve ./my-model --host 0.0.0.0
"""
SPARE_THREADS = 8  # besides those for answers, so that probes and refusals get an answer under any load


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
    if not opened(server, arguments):
        return 1
    if not models.settings.api_keys:
        warn_of_strangers(arguments.host)
    try:
        loaded = load(models, server.url, signals)
        if loaded:
            check_kinds(arguments, models)
            print(welcome(server.url, models, page=not arguments.no_page), flush=True)
            signals.wait()
            drain(server, front, models, arguments.drain_timeout)
    finally:
        end(server, front, models)
    if not loaded:
        # The engine's thread may be importing torch or reading weights. Nothing can stop it there, and an orderly exit
        # of the interpreter would wait for it, or crash.
        os._exit(0)
    return 0


def log_to_stderr(arguments: argparse.Namespace) -> None:
    stderr = logging.StreamHandler()
    stderr.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[stderr], level=logging.WARNING)
    logging.getLogger("lmbridge").setLevel(logging.CRITICAL)  # while loading, the command itself reports a failure
    logging.getLogger("lmbridge.loading").setLevel(logging.INFO)
    if arguments.access_log:
        logging.getLogger("lmbridge.access").setLevel(logging.INFO)
    if arguments.log_prompts:
        logging.getLogger("lmbridge.flask.openai").setLevel(logging.INFO)


def load(models: Models, url: str, signals: Signals) -> bool:
    """Load every model; return False if a signal arrived first.

    Raises:
        LMBridgeError: a model could not be loaded.
    """
    names = ", ".join(models.names())
    print(f"Listening on {url}, loading {names}", flush=True)
    with spinner(f"Loading {names}"):
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
