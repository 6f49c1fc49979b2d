"""What an open port is sent by those who mean no good: ``lmbridge serve``'s server refuses it, and serves on."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from lmbridge.flask.disconnect import watch
from lmbridge.flask.http_server import connections
from lmbridge.flask.http_server import server as http_server
from tests.conftest import until
from tests.flask.conftest import on_gunicorn
from tests.flask.operations.test_http_server import PATIENCE, connect, hello, serving
from tests.flask.smuggling import HIDDEN, SHAPES, answers

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

LIMIT = 200_000  # bytes of a body
OTHER = {"a chunk of fifteen f's": 413, "a head without end": 431}
MISREAD = """
    from flask import Flask, request

    app = Flask(__name__)
    asked = []

    @app.route("/<path:path>", methods=["GET", "POST"])
    def take(path):
        asked.append(path)
        return str(len(request.get_data()))

    @app.get("/log")
    def log():
        return asked
"""


class Asked:
    """An app that keeps what it was asked for, and reads no body."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.paths.append(environ["PATH_INFO"])
        return hello(environ, start_response)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has more than a moment for anything."""
    for name in ("HEAD_TIME", "BODY_TIME", "IDLE_TIME", "READ_TIME", "LINGER_TIME"):
        monkeypatch.setattr(connections, name, 0.2)
    monkeypatch.setattr(http_server, "LOOK", 0)


def is_closed(client: socket.socket) -> bool:
    """Whether the server closes the connection, with an answer or without."""
    client.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            pass
    return True


@pytest.mark.parametrize("shape", SHAPES)
def test_what_can_be_read_in_two_ways(shape: str) -> None:
    """A proxy that reads it otherwise would let one user's bytes become another's request."""
    app = Asked()
    with serving(app, max_body=LIMIT) as (server, _):
        assert answers(server.url, SHAPES[shape]) == [OTHER.get(shape, 400)]
    assert app.paths == []


def test_gunicorn_hides_no_request_either(tmp_path: Path) -> None:
    """The other server that the documentation names for open ports takes nothing that was hidden in another request."""
    with on_gunicorn(tmp_path, MISREAD) as url:
        for sent in SHAPES.values():
            if HIDDEN in sent:
                answers(url, sent)
        with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)) as client:
            client.request("GET", "/log")
            assert "hidden" not in json.loads(client.getresponse().read())


def ask(address: tuple[str, int], *sent: bytes) -> list[bytes]:
    """The statuses and the bodies of what is answered until the connection is closed."""
    with socket.create_connection(address, PATIENCE) as client:
        for part in sent:
            client.sendall(part)
        with client.makefile("rb") as answer:
            return re.findall(rb"HTTP/1.1 [0-9]+ [A-Za-z]+|hello", answer.read())


def test_a_client_that_asks_before_it_sends() -> None:
    """It is told to go on where there is something to send, and otherwise answered; no two requests are made one."""
    seen: list[tuple[str, str | None]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append((environ["PATH_INFO"], environ.get("HTTP_AUTHORIZATION")))
        return hello(environ, start_response)

    first = b"GET /one HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key\r\nExpect: 100-continue\r\n\r\n"
    last = b"GET /two HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with serving(app, max_body=LIMIT) as (_, address):
        assert ask(address, first, last) == [b"HTTP/1.1 200 OK", b"hello"] * 2
        assert seen == [("/one", "Bearer key"), ("/two", None)]
        ready = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
        told = [b"HTTP/1.1 100 Continue", b"HTTP/1.1 200 OK", b"hello"]
        assert ask(address, ready + b"Content-Length: 5\r\n\r\n", b"x" * 5) == told
        assert ask(address, ready + b"Content-Length: 5000000\r\n\r\n")[0].startswith(b"HTTP/1.1 413")
        assert ask(address, ready + b"Content-Length: x\r\n\r\n")[0].startswith(b"HTTP/1.1 400")


def test_a_byte_out_of_band(caplog: pytest.LogCaptureFixture) -> None:
    """It ends the connection rather than keep the server busy with it."""
    with serving(hello) as (_, address), socket.create_connection(address, PATIENCE) as client:
        client.send(b"x", socket.MSG_OOB)
        assert is_closed(client)
    assert "priority" not in caplog.text


def test_a_trailer_without_end() -> None:
    """What follows the last chunk is bounded as a head is."""
    with serving(hello, max_body=5_000_000) as (_, address), socket.create_connection(address, PATIENCE) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"X: " + b"x" * 1000)
        assert is_closed(client)


@pytest.mark.usefixtures("quick")
def test_who_hangs_up_tells_the_next_request() -> None:
    """A client that reads nothing is given up, and what it has asked for besides must not go on computing."""
    told = threading.Event()

    class Watch:
        def gone(self) -> None:
            told.set()

    watcher = Watch()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        if environ["PATH_INFO"] == "/large":
            return [b"x" * 10_000_000]
        end = watch(environ, watcher.gone)
        told.wait(PATIENCE)
        end()
        return [b"too late"]

    with serving(app) as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\nGET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert told.wait(PATIENCE)


def test_the_end_waits_for_what_is_being_sent() -> None:
    """An answer that the app has given is the client's once it has read it, and not before."""
    size = 8_000_000

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", str(size))])
        return [b"x" * size]

    with serving(app) as (server, address), connect(address) as client:
        client.request("GET", "/")
        response = client.getresponse()
        assert not server.wait_until_sent(0.1)
        assert len(response.read()) == size
        assert server.wait_until_sent(PATIENCE)


def test_a_refusal_has_the_form_of_the_others() -> None:
    """Clients show the words that stand in it."""
    with serving(hello, max_body=LIMIT) as (_, address), connect(address) as client:
        client.request("POST", "/", b"x" * (LIMIT + 1))
        response = client.getresponse()
        told = json.loads(response.read())
        assert (response.status, response.headers["Content-Type"]) == (413, "application/json")
        assert told["error"]["message"] == "The request body is too large; the limit is 200,000 bytes."
        assert told["error"]["type"] == "invalid_request_error"
    with serving(hello, max_body=LIMIT) as (_, address), connect(address) as client:
        client.request("POST", "/", b"x" * LIMIT)
        assert client.getresponse().read() == b"hello"


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_a_body_without_end(chunked: bool) -> None:
    """It is refused while it comes, takes no memory, and the client that goes on sending reads why."""
    memory = psutil.Process().memory_info().rss
    part = b"x" * 65536
    sent = 0
    with serving(hello, max_body=LIMIT) as (_, address), socket.create_connection(address, PATIENCE) as client:
        how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 2000000000"
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + how + b"\r\n\r\n")
        answer = threading.Thread(target=lambda: received.append(client.recv(12)))
        received: list[bytes] = []
        answer.start()
        with contextlib.suppress(ConnectionError):
            while sent < 2_000_000_000:
                client.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                sent += len(part)
        answer.join(PATIENCE)
    assert received == [b"HTTP/1.1 413"]
    assert sent < 200_000_000
    assert psutil.Process().memory_info().rss - memory < 50_000_000


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "begun",
    [b"", b"GET", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"],
    ids=["no", "head", "body"],
)
def test_the_time_for_a_request_is_limited_in_all(begun: bytes) -> None:
    """One byte now and then keeps no connection open, and one that says nothing is closed as well."""
    with serving(hello) as (_, address), socket.create_connection(address, PATIENCE) as client:
        client.sendall(begun)
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while begun and not ended.wait(0.05):
                    client.sendall(b"G" if begun == b"GET" else b"")

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert is_closed(client)
        ended.set()
        dripping.join()


def dripping(address: tuple[str, int], count: int) -> Iterator[socket.socket]:
    """Connections that have begun a request."""
    for _ in range(count):
        client = socket.create_connection(address, PATIENCE)
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        yield client


def test_slow_clients_hold_no_thread() -> None:
    """However many send their requests a byte at a time, whoever sends one whole is answered."""
    with serving(hello, threads=1) as (_, address), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(client) for client in dripping(address, 300)]
        for _ in range(5):
            for client in slow:
                client.sendall(b"x")
            with connect(address) as other:
                other.request("GET", "/")
                assert other.getresponse().read() == b"hello"


def test_a_full_house_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds all connections open, and asks nothing, does not keep out those who ask."""
    with serving(hello) as (server, address), contextlib.ExitStack() as stack:
        inner: Any = server._listener
        monkeypatch.setattr(connections, "CONNECTIONS", 20)
        monkeypatch.setattr(connections, "GRACE", 0.0)
        slow = [stack.enter_context(client) for client in dripping(address, 40)]
        with connect(address) as other:
            other.request("GET", "/")
            assert other.getresponse().read() == b"hello"
        assert is_closed(slow[0])
        until(lambda: len(inner.active_channels) <= 20)


@pytest.mark.usefixtures("quick")
def test_a_client_that_reads_nothing_is_given_up() -> None:
    """It would hold its thread, and its request the model, for ever."""
    closed = threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 1_000_000
        finally:
            closed.set()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return endless()

    with serving(app, threads=1) as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert closed.wait(PATIENCE)


@pytest.mark.usefixtures("quick")
def test_an_answer_that_takes_long_is_not_cut() -> None:
    """The time limits are for clients; a model may think for as long as it likes."""
    go_on = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"one "
        go_on.wait(PATIENCE)
        yield b"two"

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return slow()

    with serving(app) as (server, address), connect(address) as client:
        inner: Any = server._listener
        client.request("GET", "/")
        response = client.getresponse()
        (channel,) = inner.active_channels.values()
        until(lambda: time.time() - channel.last_activity > 0.5)  # longer than any limit
        go_on.set()
        assert response.read() == b"one two"


def test_an_idle_server_ends_at_once() -> None:
    """A process manager that has to wait kills."""
    with serving(hello, threads=64) as (server, address), connect(address) as client:
        client.request("GET", "/")
        assert client.getresponse().read() == b"hello"
        before = time.monotonic()
        server.close()
        assert time.monotonic() - before < http_server.STOP_GRACE  # it waited for nobody
        with pytest.raises(ConnectionError):
            socket.create_connection(address, 1).recv(1)
