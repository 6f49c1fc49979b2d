"""By which names a server may be called: what a page that rebinds its own name to this machine gets."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator

import pytest
from flask import Flask
from hypothesis import given, strategies

from lmbridge import Bridge, InvalidRequestError
from lmbridge.flask import LMBridge
from lmbridge.flask.hosts import allowed_name, host_of, is_allowed, is_loopback
from lmbridge.flask.serving import create_app
from lmbridge.testing import ScriptedEngine
from tests.flask.conftest import Serve

PATIENCE = 30.0
ALLOWED = ["lm.example.org", ".lan.example"]
RIGHT = [
    "localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "web.localhost", "127.0.0.1", "127.0.0.1:99999",
    "[::1]", "[::1]:8000", "192.168.1.7:8000", "[fe80::1%25eth0]:80", "[2001:DB8::7]", "lm.example.org",
    "LM.Example.Org.:8000", "lm.example.org:", "lan.example", "a.b.lan.example",
]  # fmt: skip
WRONG = [
    "evil.example", "evil.example:8000", "example.org", "x.lm.example.org", "lm.example.org.evil.example",
    "badlan.example", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example", "127.1", "0x7f000001",
    "2130706433", "0177.0.0.1",
]  # fmt: skip
BROKEN = [
    "", " ", ":8000", "a b", "localhost,evil.example", "localhost, localhost", "user@localhost", "localhost/x", "::1",
    "[::1", "::1]", "[localhost]", "[]", "[::1]x", "localhost:80:80", "localhost:http", "a..b", ".localhost", "..",
    "http://localhost", "höst", "\x7f", "%6cocalhost", "a" * 300, "[" * 50,
]  # fmt: skip


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    """All that ``lmbridge serve`` serves, called lm.example.org and whatever lies below lan.example."""
    with Bridge(ScriptedEngine()) as bridge:
        yield create_app({"LMBRIDGE_MODELS": {"demo": bridge}, "LMBRIDGE_ALLOWED_HOSTS": ALLOWED})


def raw(url: str, head: str) -> tuple[int, str]:
    """Status and body of the answer to a request's head as it stands."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with contextlib.closing(socket.create_connection((host, int(port)), PATIENCE)) as client:
        client.sendall(head.encode("latin-1") + b"\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        return response.status, response.read().decode()


def test_only_names_of_its_own_are_answered(app: Flask, serve: Serve) -> None:
    """Under every server, a name that is none of ours gets 421 and no word of the model, on whatever route."""
    with serve(app) as url:
        for host in RIGHT:
            assert raw(url, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close")[0] == 200, host
        for host in WRONG:
            status, body = raw(url, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close")
            assert (status, json.loads(body)["error"]["type"]) == (421, "invalid_request_error"), host
            assert "--allowed-host" in json.loads(body)["error"]["message"]
        for path in ("/", "/health", "/status", "/metrics", "/no/such/route", "/playground/page.js"):
            status, body = raw(url, f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close")
            assert (status, "evil.example" in json.loads(body)["error"]) == (421, True), path
        status, _ = raw(url, "POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 0")
        assert status == 421


def test_what_is_no_host(app: Flask, serve: Serve) -> None:
    """Two hosts, none, or none that could be, are a 400 before anything is asked; HTTP/1.0 needs none."""
    with serve(app) as url:
        for host in BROKEN:
            assert raw(url, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close")[0] == 400, host
        two = "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close"
        assert raw(url, two)[0] == 400
        assert raw(url, "GET /health HTTP/1.1\r\nConnection: close")[0] == 400
        assert raw(url, "GET /health HTTP/1.0")[0] == 200


def test_an_app_of_ones_own_checks_where_it_is_told_to(serve: Serve) -> None:
    """An app that sets no hosts goes on as before; with "*" any name will do."""
    for config in ({}, {"LMBRIDGE_ALLOWED_HOSTS": "*"}, {"LMBRIDGE_ALLOWED_HOSTS": "a.example, any.example"}):
        own = Flask("own")
        with Bridge(ScriptedEngine()) as bridge:
            own.config.update(config, LMBRIDGE_MODEL=bridge)
            LMBridge(own)
            own.add_url_rule("/", view_func=lambda: "hello")
            with serve(own) as url:
                assert raw(url, "GET / HTTP/1.1\r\nHost: any.example\r\nConnection: close") == (200, "hello")


@pytest.mark.parametrize("host", ["https://a.example", "*.example.org", "a b", "", ".", "..a"])
def test_a_name_that_cannot_be_allowed(host: str) -> None:
    """A name that would never match is told at the start, not by the first refused client."""
    own = Flask("own")
    own.config.update(LMBRIDGE_MODEL="demo", LMBRIDGE_ALLOWED_HOSTS=["a.example", host])
    with pytest.raises(InvalidRequestError, match="LMBRIDGE_ALLOWED_HOSTS"):
        LMBridge(own)


def test_which_addresses_are_this_machine_only() -> None:
    """The warning of an open port comes where it is one, and nowhere else."""
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost", "Localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "192.168.1.7", "example.org"]))


@given(strategies.text() | strategies.from_regex(r"[\[\]a-z0-9:.]*"))
def test_no_header_is_a_server_error(header: str) -> None:
    """Whatever comes as a Host is one or none; and what is allowed as it came is found again."""
    host = host_of(header)
    if host is not None:
        assert host_of(host) == host
        assert is_allowed(host, [allowed_name(header)])
