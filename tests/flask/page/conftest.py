"""Real Chromium, headless, and real servers with the page; one browser and one server for a module."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import WSGIRequestHandler, make_server

from lmbridge import Bridge
from lmbridge.flask import LMBridge, openai, operations, playground, rerank
from lmbridge.testing import ScriptedEncoder, ScriptedEngine

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

KEY = "a-key-of-this-server"
PATIENCE = 30_000  # milliseconds after which a test is taken to hang
HOW = "needs Chromium: `pip install playwright`, and `apt-get install chromium` or its path in LMBRIDGE_CHROMIUM"


@dataclass
class Site:
    """The page's servers.

    Attributes:
        url: the page over the bundled model.
        app: its app.
        gate: has the model at ``slow/`` loaded when it is set.
        kinds: the app at ``kinds/``, with a model of each kind: ``chat``, ``minilm`` and ``ranker``.
        sockets: of the requests for answers at the root.
    """

    url: str
    app: Flask
    gate: threading.Event
    kinds: Flask
    sockets: list[socket.socket]

    def cut(self) -> None:
        """Break the connections of all answers that come in."""
        while self.sockets:
            with contextlib.suppress(OSError):  # it has ended by itself
                self.sockets.pop().shutdown(socket.SHUT_RDWR)


@dataclass
class Visit:
    """A browser's tab, and what went wrong in it."""

    page: Page
    strangers: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def build_app(page_prefix: str | None = None, **config: Any) -> Flask:
    """An app with the page; ``config`` is without the LMBRIDGE_ of its keys."""
    app = Flask(__name__)
    app.config.update({f"LMBRIDGE_{name.upper()}": value for name, value in config.items()})
    LMBridge(app)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(rerank.blueprint)
    app.register_blueprint(operations.blueprint)
    app.register_blueprint(playground.blueprint, url_prefix=page_prefix)
    return app


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """One server: the bundled model at its root, and other apps below it."""
    gate = threading.Event()
    with ExitStack() as bridges:

        def scripted(engine: ScriptedEngine) -> Bridge:
            return bridges.enter_context(closing(Bridge(engine)))

        demo = Bridge("demo")
        bridges.enter_context(closing(demo))
        app = build_app(models={"demo": demo})
        kinds = build_app(
            models={
                "chat": scripted(ScriptedEngine()).start(),
                "minilm": scripted(ScriptedEncoder(tasks=["embed"])).start(),
                "ranker": scripted(ScriptedEncoder(tasks=["rerank"])).start(),
            }
        )
        others: dict[str, WSGIApplication] = {
            "/keyed": build_app(model=scripted(ScriptedEngine()), api_keys=[KEY]),
            "/two": build_app(
                models={
                    "alpha": scripted(ScriptedEngine(lambda _: ["I am alpha."])),
                    "beta": scripted(ScriptedEngine(lambda _: ["I am beta."])),
                }
            ),
            "/kinds": kinds,
            "/encoder": build_app(model=scripted(ScriptedEncoder(tasks=["embed"])).start()),
            "/later": build_app(
                models={
                    "chat": scripted(ScriptedEngine()).start(),
                    "later": scripted(ScriptedEncoder(tasks=["rerank"], start_gate=gate)),
                }
            ),
            "/slow": build_app(models={"slow": scripted(ScriptedEngine(start_gate=gate))}),
            "/hidden": _without_prefix("/hidden", build_app("/play", models={"demo": demo})),
        }
        sockets: list[socket.socket] = []

        @app.before_request
        def remember() -> None:
            if request.method == "POST":
                sockets.append(request.environ["werkzeug.socket"])

        with _serving(DispatcherMiddleware(app, others)) as url:
            yield Site(url, app, gate, kinds, sockets)


def _without_prefix(prefix: str, app: WSGIApplication) -> WSGIApplication:
    """``app`` as behind a proxy that takes a prefix away and does not say so."""

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        return app({**environ, "SCRIPT_NAME": ""}, start_response)

    return serve


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """No access log among the tests' output."""


@contextmanager
def _serving(app: WSGIApplication) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="wsgi server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- the browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason=HOW)
    with sync_api.sync_playwright() as playwright:
        found = _chromium() or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip(HOW)
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("LMBRIDGE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Callable[..., Page]]:
    """Opens the page at a path below the server's root; the rest are options of the browser's context.

    Fails the test when the page asks anybody but its server, or complains in the browser's console.
    """
    visits: list[Visit] = []

    def open_page(path: str = "", **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        visits.append(_watched(context.new_page(), site.url))
        visits[-1].page.goto(site.url + path)
        return visits[-1].page

    yield open_page
    for seen in visits:
        seen.page.context.close()
    assert [stranger for seen in visits for stranger in seen.strangers] == []
    assert [complaint for seen in visits for complaint in seen.complaints] == []


def _watched(page: Page, home: str) -> Visit:
    seen = Visit(page)

    def refuse(route: Route) -> None:
        seen.strangers.append(route.request.url)
        route.abort()

    def listen(message: ConsoleMessage) -> None:
        # The browser itself reports each request that fails; a test that makes one fail looks at what the page says.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            seen.complaints.append(message.text)

    # A pattern, which the driver matches by itself; for a function, the page would wait while a test waits.
    page.context.route(re.compile(rf"^(?!{re.escape(home)})"), refuse)
    page.on("console", listen)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    return seen
