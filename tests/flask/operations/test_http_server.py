"""The server of ``lmbridge serve``: what it does with connections that a WSGI server has to look after."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from lmbridge.flask.http_server import HttpServer
from lmbridge.flask.serving import Front

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PATIENCE = 30.0


def hello(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answers without reading what was sent."""
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]


@contextlib.contextmanager
def serving(app: WSGIApplication, threads: int = 4, **options: Any) -> Iterator[tuple[HttpServer, tuple[str, int]]]:
    server = HttpServer(app, "127.0.0.1", 0, threads, **{"max_body": 200_000, **options})
    server.open()
    try:
        yield server, server.bind_addr
    finally:
        server.close()


def connect(address: tuple[str, int]) -> contextlib.closing[http.client.HTTPConnection]:
    return contextlib.closing(http.client.HTTPConnection(*address, timeout=PATIENCE))


def test_connections_are_kept() -> None:
    """A client's second request goes over the same connection, until the server is about to end."""
    with serving(hello) as (server, address), connect(address) as client:
        for _ in range(3):
            client.request("GET", "/")
            response = client.getresponse()
            assert (response.read(), response.headers["Connection"]) == (b"hello", None)
        server.closing = True
        client.request("GET", "/")
        response = client.getresponse()
        assert (response.read(), response.headers["Connection"]) == (b"hello", "close")


def test_an_idle_connection_takes_no_thread() -> None:
    """Browsers open connections ahead of need; they must not stand in the way of those who ask."""
    with serving(hello, threads=1) as (_, address), contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(address))
        client = stack.enter_context(connect(address))
        client.request("GET", "/")
        assert client.getresponse().read() == b"hello"


def test_what_the_app_leaves_unread() -> None:
    """A body that nobody wanted is no part of the next request."""
    with serving(hello) as (_, address), connect(address) as client:
        for _ in range(2):
            client.request("POST", "/", b"GET /smuggled HTTP/1.1\r\n\r\n" * 1000)
            assert client.getresponse().read() == b"hello"


def test_chunks_left_unread() -> None:
    """Nor is a body in chunks taken for another request."""
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    asked: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        asked.append(environ["PATH_INFO"])
        return hello(environ, start_response)

    with serving(app) as (_, address), socket.create_connection(address, PATIENCE) as client:
        head = b"POST /sent HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(smuggled), smuggled))
        client.sendall(b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with client.makefile("rb") as answer:
            assert answer.read().count(b"hello") == 2
    assert asked == ["/sent", "/next"]


def test_a_reader_that_is_behind_gets_everything() -> None:
    """More than the kernel takes at once waits for the client to read on, and arrives whole."""
    parts = [bytes([65 + n % 26]) * 300_000 for n in range(40)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return iter(parts)

    with serving(app) as (_, address), connect(address) as client:
        client.request("GET", "/")
        assert client.getresponse().read() == b"".join(parts)


def test_a_client_that_leaves_ends_the_response() -> None:
    """What streams to nobody is closed, so that the app can stop the engine."""
    closed = threading.Event()

    def tokens() -> Iterator[bytes]:
        try:
            while True:
                yield b"token " * 1000
        finally:
            closed.set()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return tokens()

    with serving(app) as (_, address):
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert closed.wait(PATIENCE)


def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Fails in the manner that its path names, as does its body; answers "/"."""
    if environ["PATH_INFO"] == "/":
        return hello(environ, start_response)
    start_response("200 OK", [])
    return fail(environ["PATH_INFO"])


def fail(manner: str) -> Iterator[Any]:
    if manner == "/exits":
        sys.exit("as told")
    if manner == "/no-bytes":
        yield "text"
    raise ValueError("as told")


@pytest.mark.parametrize("manner", ["raises", "exits", "no-bytes"])
def test_a_response_that_fails_at_once(manner: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is a 500 rather than an empty 200, is logged, and ends neither the server nor one of its threads."""
    with serving(broken, threads=1) as (_, address):
        for _ in range(3):
            with connect(address) as client:
                client.request("GET", f"/{manner}")
                assert client.getresponse().status == 500
        with connect(address) as client:
            client.request("GET", "/")
            assert client.getresponse().read() == b"hello"
    assert "as told" in caplog.text or "must yield bytes" in caplog.text


def test_a_response_is_closed_whatever_happens() -> None:
    """One that had nothing to say, and whose client has gone, is closed like any other, or it would keep its place."""
    closed = threading.Event()
    asked, gone = threading.Event(), threading.Event()

    class Nothing:
        def __iter__(self) -> Iterator[bytes]:
            asked.set()
            assert gone.wait(PATIENCE)
            return iter(())

        def close(self) -> None:
            closed.set()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("X-Long", "x" * 100)])
        return Nothing()

    with serving(app) as (_, address):
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset when it closes
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert asked.wait(PATIENCE)
        gone.set()
        assert closed.wait(PATIENCE)


def test_places() -> None:
    """Front counts a request until its response has been sent, or has failed, and marks the one that is too many."""
    marked: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        marked.append("lmbridge.crowded" in environ)
        if environ["PATH_INFO"] == "/fails":
            raise RuntimeError("as told")
        return iter([b"a", b"b"])

    def ask(method: str, path: str = "/v1/completions") -> Any:
        return front({"REQUEST_METHOD": method, "PATH_INFO": path}, lambda *args: lambda data: None)

    front = Front(app, places=2)
    with pytest.raises(RuntimeError):
        ask("POST", "/fails")
    first, second, third = ask("POST"), ask("POST"), ask("POST")
    ask("GET")
    ask("POST", "/admin/swap")
    assert (marked, front.inside) == ([False, False, False, True, False, False], 3)
    for response in (third, second):
        assert b"".join(response) == b"ab"
        response.close()
    assert not front.wait_until_empty(0.01)
    leave = threading.Timer(0.05, first.close)
    leave.start()
    assert front.wait_until_empty(PATIENCE)
    leave.join()


def test_another_waitress_is_refused_by_name() -> None:
    """What it lacks is told at the start, and not by the first client that needs it."""
    code = "from waitress.channel import HTTPChannel as c; del c.send_continue; import lmbridge.flask.http_server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert "MissingDependencyError: This waitress has no HTTPChannel.send_continue." in done.stderr
