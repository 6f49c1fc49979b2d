"""Flask apps with the OpenAI blueprint: some behind a real server, one of them with the bundled model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask
from openai import OpenAI
from werkzeug.serving import WSGIRequestHandler, make_server

from lmbridge import Bridge
from lmbridge.flask import LMBridge
from lmbridge.flask.openai import blueprint
from lmbridge.testing import ScriptedEngine

PATIENCE = 30.0  # seconds after which a test is taken to hang


@dataclass
class Served:
    """An app on a real, threaded server.

    Attributes:
        url: what an OpenAI client takes as its base_url.
        bridge: the bridge behind it.
        engine: its engine, where that is a scripted one.
    """

    url: str
    bridge: Bridge
    engine: ScriptedEngine

    def client(self, **options: Any) -> OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return OpenAI(base_url=self.url, **options)


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """No access log among the tests' output."""


def build_app(models: dict[str, Any], **config: Any) -> Flask:
    """An app with ``models`` and the blueprint; ``config`` is without the LMBRIDGE_ of its keys."""
    app = Flask(__name__)
    app.config["LMBRIDGE_MODELS"] = models
    app.config.update({f"LMBRIDGE_{name.upper()}": value for name, value in config.items()})
    LMBridge(app)
    app.register_blueprint(blueprint)
    return app


@contextmanager
def serving(app: Flask) -> Iterator[str]:
    """The address of ``app`` on Werkzeug's threaded server."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="wsgi server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The bundled model behind a server, loaded once a module."""
    with Bridge("demo", when_full="reject") as bridge, serving(build_app({"demo": bridge})) as address:
        yield Served(f"{address}/v1", bridge, ScriptedEngine())


@pytest.fixture
def served() -> Iterator[Callable[..., Served]]:
    """Serves a scripted engine; ``bridge`` holds the bridge's options, and what else is given configures the app."""
    with ExitStack() as stack:

        def serve(engine: ScriptedEngine | None = None, bridge: dict[str, Any] | None = None, **config: Any) -> Served:
            engine = engine or ScriptedEngine()
            made = Bridge(engine, **(bridge or {}))
            stack.callback(made.close)
            address = stack.enter_context(serving(build_app({"scripted": made}, **config)))
            return Served(f"{address}/v1", made, engine)

        yield serve
