"""What surrounds the views: keys, ids, sizes, CORS, and errors of routes that are none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from lmbridge import Bridge
from lmbridge.flask import LMBridge
from lmbridge.flask.openai import blueprint
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import Served, build_app, serving

HELLO = {"model": "scripted", "messages": [{"role": "user", "content": "Hello secret"}]}


class Site:
    """Builds test clients of apps over one scripted engine."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.bridge = Bridge(self.engine)

    def client(self, **config: Any) -> FlaskClient:
        return build_app({"scripted": self.bridge}, **config).test_client()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    with site.bridge:
        yield site


def envelope(response: TestResponse) -> dict[str, Any]:
    """The error in the envelope, which holds nothing else."""
    body: Any = response.get_json()
    assert list(body) == ["error"]
    found: dict[str, Any] = body["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


# --- routes ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models/none/such", 404),
        ("DELETE", "/v1/chat/completions/extra", 404),
        ("OPTIONS", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/scripted", 405),
    ],
)
def test_errors_of_routing(site: Site, method: str, path: str, status: int) -> None:
    """What is no route, or not that method's, is answered in the envelope like every other error."""
    response = site.client().open(path, method=method)
    assert response.status_code == status
    assert envelope(response)["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]
    if status == 405:
        assert response.headers["Allow"]


def test_other_paths_keep_the_apps_own_errors(site: Site) -> None:
    """The rest of the app answers as it did."""
    assert not site.client().get("/elsewhere").is_json


def test_the_prefix_is_the_apps_choice(site: Site) -> None:
    """Registered under another prefix, the routes are there."""
    app = Flask(__name__)
    app.config["LMBRIDGE_MODELS"] = {"scripted": site.bridge}
    LMBridge(app)
    app.register_blueprint(blueprint, url_prefix="/api/v1")
    assert app.test_client().post("/api/v1/chat/completions", json=HELLO).status_code == 200
    assert envelope(app.test_client().get("/api/v1/none"))


# --- bodies ---


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_what_is_not_said_to_be_json(site: Site, content_type: str | None) -> None:
    """A page of another origin may send these without asking; JSON it may not."""
    response = site.client().post("/v1/chat/completions", data=b'{"messages": []}', content_type=content_type)
    assert response.status_code == 415
    assert "application/json" in envelope(response)["message"]


def test_the_size_of_a_body_is_bounded(site: Site) -> None:
    """A body at the limit is read, one above it is 413, with its length told before or not."""
    client = site.client(max_request_bytes=200)
    padded = b'{"messages": [{"role": "user", "content": "Hello"}], "pad": "' + b"x" * 150
    fits = padded[:198] + b'"}'
    assert client.post("/v1/chat/completions", data=fits, content_type="application/json").status_code == 200
    assert client.post("/v1/chat/completions", data=fits + b" ", content_type="application/json").status_code == 413


def test_a_large_body_hears_why(address: str) -> None:
    """Over a real connection too, a client that is still sending gets the 413 rather than a broken pipe."""
    big = {"messages": [{"role": "user", "content": "x" * 6_000_000}]}
    response = requests.post(f"{address}/v1/chat/completions", json=big, timeout=30)
    assert response.status_code == 413
    assert response.json()["error"]["message"]
    chunked = requests.post(
        f"{address}/v1/chat/completions",
        data=iter([b"x" * 1000] * 6000),
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert chunked.status_code == 413


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with ExitStack() as stack:
        yield stack.enter_context(serving(build_app({"scripted": site.bridge})))


# --- keys ---


def test_keys(site: Site) -> None:
    """With keys set, each of them opens and nothing else does, on every route; without, nobody is asked."""
    client = site.client(api_keys=["first", "sécond"])
    for key in ("first", "sécond"):
        header = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        assert client.get("/v1/models", headers=header).status_code == 200
        assert client.post("/v1/chat/completions", json=HELLO, headers=header).status_code == 200
    for header in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer"},
    ):
        for response in (
            client.get("/v1/models", headers=header),
            client.post("/v1/chat/completions", json=HELLO, headers=header),
            client.get("/v1/nothing", headers=header),
        ):
            assert response.status_code == 401
            assert envelope(response)["code"] == "invalid_api_key"
    assert site.client().get("/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200


def test_the_official_client_knows_a_refused_key(site: Site) -> None:
    """A wrong key is the exception its users catch."""
    with serving(build_app({"scripted": site.bridge}, api_keys="good")) as address:
        served = Served(f"{address}/v1", site.bridge, site.engine)
        with served.client(api_key="bad") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with served.client(api_key="good") as client:
            assert [model.id for model in client.models.list()] == ["scripted"]


# --- ids and logs ---


def test_request_ids(site: Site) -> None:
    """A sane id comes back and names the request on the bridge; others are replaced; twice the same does no harm."""
    client = site.client()
    for _ in range(2):
        response = client.post("/v1/chat/completions", json=HELLO, headers={"x-request-id": "trace-1"})
        assert response.headers["x-request-id"] == "trace-1"
    assert [name.startswith("trace-1") for name in site.engine.started] == [True, True]
    for given in ("", "x" * 129, "spaces in it", "é"):
        response = client.get("/v1/models", headers={"x-request-id": given})
        assert response.headers["x-request-id"] not in ("", given)


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_in_logs(site: Site, caplog: pytest.LogCaptureFixture, asked: bool) -> None:
    """No text of a prompt is logged, not even of one that fails, unless that was asked for."""
    caplog.set_level(logging.DEBUG, "lmbridge")
    client = site.client(log_prompts=asked)
    assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
    site.engine.fail("Hello secret", ValueError("bad luck"))
    assert client.post("/v1/chat/completions", json=HELLO).status_code == 500
    assert client.post("/v1/chat/completions", json={**HELLO, "n": "Hello secret"}).status_code == 400
    assert ("Hello secret" in caplog.text) == asked


# --- CORS ---


def test_cors_is_off(site: Site) -> None:
    """Unless origins are named, no page of another origin reads an answer."""
    response = site.client().get("/v1/models", headers={"Origin": "https://a.example"})
    assert not [name for name, _ in response.headers if name.startswith("Access-Control")]


def test_cors(site: Site) -> None:
    """A page of a named origin may ask, its preflight needs no key, and errors can be read too; others may not."""
    client = site.client(cors_origins=["https://a.example"], api_keys=["k"])
    preflight = client.options(
        "/v1/chat/completions",
        headers={
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    refused = client.get("/v1/models", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "Origin" in refused.headers["Vary"]
    other = client.get("/v1/models", headers={"Origin": "https://b.example", "Authorization": "Bearer k"})
    assert "Access-Control-Allow-Origin" not in other.headers
    anybody = site.client(cors_origins="*").get("/v1/models", headers={"Origin": "https://b.example"})
    assert anybody.headers["Access-Control-Allow-Origin"] == "*"
