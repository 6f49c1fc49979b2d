"""A client that goes away stops the engine, on real servers, while the model is silent too."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, Response, request

from lmbridge.flask import LMBridge, current_bridge, disconnected
from lmbridge.flask.models import models_of
from lmbridge.flask.testing import scripted_engine
from tests.flask.conftest import Serve, on_gunicorn, on_waitress

HOUR = 3600.0  # seconds; a heartbeat that never comes, so that it is the watching that notices


def make_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_HEARTBEAT": HOUR, **config})
    lm = LMBridge(app)

    @app.post("/ask")
    def ask() -> dict[str, str]:
        return {"text": current_bridge.infer(request.get_data(as_text=True)).text}

    @app.post("/tell")
    def tell() -> Response:
        return lm.stream_response(current_bridge.stream(request.get_data(as_text=True)))

    return app


def open_request(url: str, path: str, body: str) -> socket.socket:
    """Send a request, and leave its answer unread."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


@pytest.mark.parametrize("path", ["/ask", "/tell"])
def test_a_silent_model_is_stopped(serve: Serve, path: str) -> None:
    """Nothing is written while the model is silent, so no write can fail; the connection itself must be watched."""
    app = make_app()
    told = threading.Event()

    def on_gone(sender: Flask, model: str) -> None:
        told.set()

    with (
        scripted_engine(app, manual=True) as engine,
        serve(app) as url,
        disconnected.connected_to(on_gone, app),
    ):
        connection = open_request(url, path, "wait for me")
        engine.wait_for(lambda engine: engine.active == 1)
        connection.close()
        engine.wait_for(lambda engine: engine.active == 0)
        assert told.wait(10)
        assert models_of(app).disconnects == 1
        while not models_of(app).bridge().metrics.cancels["disconnect"]:  # bounded by the test's own timeout
            threading.Event().wait(0.001)
        assert len(engine.aborted) == 1


def test_one_that_goes_leaves_the_others(serve: Serve) -> None:
    """Each connection is watched for itself."""
    app = make_app()
    with scripted_engine(app, manual=True) as engine, serve(app) as url:
        leaving = open_request(url, "/tell", "going away soon")
        staying = open_request(url, "/ask", "staying here")
        engine.wait_for(lambda engine: engine.active == 2)
        leaving.close()
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step(2)
        with staying, staying.makefile("rb") as answer:
            head, body = _whole(answer)
        assert b"200" in head.splitlines()[0]
        assert json.loads(body) == {"text": "staying here"}


def _whole(answer: Any) -> tuple[bytes, bytes]:
    """One response of a connection that stays open."""
    head, length = b"", 0
    while (line := answer.readline()) not in (b"\r\n", b""):
        head += line
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, answer.read(length)


def test_a_connection_that_is_used_again_is_watched_again() -> None:
    """Keep-alive: what was watched for the first request must not be forgotten, or taken for gone, at the second."""
    app = make_app()
    with scripted_engine(app, manual=True) as engine, on_waitress(app) as url:
        with open_request(url, "/ask", "one") as connection, connection.makefile("rb") as answer:
            engine.wait_for(lambda engine: engine.active == 1)
            engine.step()
            _whole(answer)
            connection.sendall(b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\ntwo")
            engine.wait_for(lambda engine: engine.active == 1)
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 1


GUNICORN = """
    import json, threading, time
    from flask import Flask, Response, request
    from lmbridge import Bridge
    from lmbridge.flask import LMBridge, current_bridge
    from lmbridge.testing import ScriptedEngine

    def engine():
        return ScriptedEngine(manual=True)

    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODEL=Bridge(engine), LMBRIDGE_HEARTBEAT=3600.0)
    lm = LMBridge(app)

    @app.post("/ask")
    def ask():
        return {"text": current_bridge.infer(request.get_data(as_text=True)).text}

    @app.post("/tell")
    def tell():
        return lm.stream_response(current_bridge.stream(request.get_data(as_text=True)))

    @app.get("/running")
    def running():
        return {"running": lm.models.bridge().health().running, "disconnects": lm.models.disconnects}
"""


@pytest.fixture(scope="module")
def gunicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_gunicorn(tmp_path_factory.mktemp("gunicorn"), GUNICORN) as url:
        yield url


def running(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/running", timeout=20) as answer:
        found: dict[str, int] = json.loads(answer.read())
        return found


@pytest.mark.parametrize("path", ["/ask", "/tell"])
def test_on_gunicorn(gunicorn: str, path: str) -> None:
    """The worker that serves has the bridge, and notices a lost client while the model is silent."""
    before = running(gunicorn)["disconnects"]
    connection = open_request(gunicorn, path, "wait for me")
    while running(gunicorn)["running"] != 1:  # bounded by the test's own timeout
        pass
    connection.close()
    while running(gunicorn)["running"] != 0:
        pass
    assert running(gunicorn)["disconnects"] == before + 1


def test_silence_is_filled_with_heartbeats() -> None:
    """Proxies cut connections that say nothing; a comment is no event, so clients never see it."""
    app = make_app(LMBRIDGE_HEARTBEAT=0.05)
    with scripted_engine(app, manual=True) as engine:
        answer = app.test_client().post("/tell", data="a b", buffered=False)
        parts = answer.iter_encoded()
        assert next(parts) == b": open\n\n"
        assert next(parts) == b": ping\n\n"
        engine.step(2)
        rest = b"".join(part for part in parts if part != b": ping\n\n")
        assert b'{"text": "a' in rest
        assert b'"finish_reason": "stop"' in rest
        answer.close()
