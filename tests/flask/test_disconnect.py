"""A client that goes away stops the engine, on real servers, while the model is silent too."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, Response, request

from lmbridge.flask import LMBridge, current_bridge, disconnect, disconnected
from lmbridge.flask.disconnect import watch
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
        models_of(app).bridge().stats()  # asked of the loop, which has had its final word before it answers
        assert models_of(app).bridge().metrics.cancels["disconnect"] == 1
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
    import threading
    from flask import Flask, Response, request
    from lmbridge import Bridge
    from lmbridge.flask import LMBridge, current_bridge, disconnected
    from lmbridge.testing import ScriptedEngine

    engine, gone = ScriptedEngine(manual=True), threading.Semaphore(0)
    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODEL=Bridge(engine), LMBRIDGE_HEARTBEAT=3600.0)
    lm = LMBridge(app)

    @disconnected.connect
    def on_gone(sender, model):
        gone.release()

    @app.post("/ask")
    def ask():
        return {"text": current_bridge.infer(request.get_data(as_text=True)).text}

    @app.post("/tell")
    def tell():
        return lm.stream_response(current_bridge.stream(request.get_data(as_text=True)))

    @app.post("/plain")
    def plain():
        return Response(delta.text for delta in current_bridge.stream(request.get_data(as_text=True)))

    @app.post("/step")
    def step():
        engine.step()
        return "stepped"

    @app.get("/active/<int:count>")
    def active(count):
        engine.wait_for(lambda engine: engine.active == count)
        return "so it is"

    @app.get("/gone")
    def wait_for_one_to_go():
        assert gone.acquire(timeout=20)
        return "one has gone"
"""


@pytest.fixture(scope="module")
def gunicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_gunicorn(tmp_path_factory.mktemp("gunicorn"), GUNICORN) as url:
        yield url


def call(url: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(url, data, timeout=20) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.parametrize("path", ["/ask", "/tell", "/plain"])
def test_on_gunicorn(gunicorn: str, path: str) -> None:
    """The worker that serves has the bridge, and notices a lost client while the model is silent."""
    connection = open_request(gunicorn, path, "wait for me")
    call(f"{gunicorn}/active/1")
    connection.close()
    call(f"{gunicorn}/gone")
    call(f"{gunicorn}/active/0")


def test_a_plain_stream_on_gunicorn(gunicorn: str) -> None:
    """What Flask streams by itself arrives whole, and leaves nothing running."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call, f"{gunicorn}/plain", b"one two")
        call(f"{gunicorn}/active/1")
        call(f"{gunicorn}/step", b"")
        call(f"{gunicorn}/step", b"")
        assert answer.result(20) == b"one two"
    call(f"{gunicorn}/active/0")


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


# --- the thread that watches ---


class Connection:
    """One end of a connection, as a server's environ has it, and whoever is to be told."""

    def __init__(self) -> None:
        self.client, self.socket = socket.socketpair()
        self.environ = {"lmbridge.socket": self.socket}
        self.told = threading.Event()

    def on_gone(self) -> None:
        self.told.set()

    def fail(self) -> None:
        self.on_gone()
        raise SystemExit("as told")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.client.close()
        self.socket.close()


def watcher() -> threading.Thread:
    (found,) = [thread for thread in threading.enumerate() if thread.name == "lmbridge disconnects"]
    return found


def test_a_connection_may_be_watched_twice() -> None:
    """Threads of a request have a watch of their own; a second one must not end the first, nor its end the other."""
    with Connection() as first, Connection() as second, Connection() as third:
        watch(first.environ, first.on_gone)
        watch(first.environ, second.on_gone)
        watch(first.environ, third.on_gone)()
        first.client.close()
        assert first.told.wait(10)
        assert second.told.wait(10)
        assert not third.told.is_set()


def test_a_connection_that_is_closed_already() -> None:
    """A server may be faster than a thread that asks late; there is nothing to watch, and nothing to fail for."""
    gone = Connection()
    with gone:
        pass
    watch(gone.environ, gone.on_gone)()


def test_a_listener_that_exits() -> None:
    """``sys.exit`` in somebody's signal handler must not end the watch over everybody else."""
    with Connection() as first, Connection() as second:
        watch(first.environ, first.fail)
        watch(second.environ, second.on_gone)
        before = watcher()
        first.client.close()
        assert first.told.wait(10)
        second.client.close()
        assert second.told.wait(10)
        assert watcher() is before


def test_a_listener_that_takes_long() -> None:
    """An alert that is sent over a slow network must not keep others' engines busy meanwhile."""

    class Slow(Connection):
        def on_gone(self) -> None:
            super().on_gone()
            second.told.wait(20)

    with Slow() as first, Connection() as second:
        watch(first.environ, first.on_gone)
        watch(second.environ, second.on_gone)
        first.client.close()
        assert first.told.wait(10)
        second.client.close()
        assert second.told.wait(10)


def test_a_server_that_cannot_say() -> None:
    """Waitress is asked; an error of its own ends one request, and not the watch over the others."""

    def is_gone() -> bool:
        raise SystemExit("as told")

    with Connection() as first, Connection() as second:
        watch({"waitress.client_disconnected": is_gone}, first.on_gone)
        watch(second.environ, second.on_gone)
        assert first.told.wait(10)
        second.client.close()
        assert second.told.wait(10)


def strike(thread: threading.Thread) -> None:
    """Throw SystemExit into a thread, as debuggers and supervisors of tasks do."""
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


def test_a_watcher_that_is_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    """An exception thrown into the thread costs a line in the log, and no connection its watch."""
    with Connection() as first:
        watch(first.environ, first.on_gone)
        strike(watcher())
        first.client.close()
        assert first.told.wait(10)
    assert "trying again" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watcher_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next starts another thread, which finds what was watched before."""

    def fail(*args: object) -> None:
        raise SystemExit("as told")

    with Connection() as first, Connection() as second:
        watch(first.environ, first.on_gone)
        with monkeypatch.context() as patch:
            patch.setattr(disconnect.logger, "exception", fail)
            dying = watcher()
            strike(dying)
            dying.join(10)
            assert not dying.is_alive()
        watch(second.environ, second.on_gone)
        for connection in (first, second):
            connection.client.close()
            assert connection.told.wait(10)


def test_a_child_of_a_fork() -> None:
    """Whoever held the watcher's locks does not exist in the child, where requests must not wait for it."""
    with Connection() as first, Connection() as second:
        end = watch(first.environ, first.on_gone)
        with disconnect._watcher()._lock, disconnect._making:
            child = os.fork()
        if child == 0:
            signal.alarm(10)
            end()
            watch(second.environ, second.on_gone)
            second.socket.shutdown(socket.SHUT_RDWR)
            os._exit(0 if second.told.wait(5) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not second.told.is_set()
        first.client.shutdown(socket.SHUT_RDWR)
        assert first.told.wait(10)
