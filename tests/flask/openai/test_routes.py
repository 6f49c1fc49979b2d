"""Paths: what clients make of a base URL and of a model's name, on every server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from openai import NotFoundError, OpenAI

from lmbridge import Bridge
from lmbridge.flask import LMBridge
from lmbridge.flask.openai import blueprint
from lmbridge.testing import ScriptedEngine
from tests.flask.conftest import Serve
from tests.flask.openai.conftest import PATIENCE, build_app

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def app() -> Iterator[Flask]:
    with Bridge(ScriptedEngine()) as bridge, Bridge(ScriptedEngine()) as other:
        yield build_app({"org/model": bridge, "50%2F50": other})


def test_a_models_name_with_a_slash_is_found(app: Flask, serve: Serve) -> None:
    """Clients write the slash as %2F, which some servers decode and some do not."""
    with serve(app) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        assert client.models.retrieve("org/model").id == "org/model"
        assert client.get("/models/org/model", cast_to=object) == client.get("/models/org%2Fmodel", cast_to=object)
        with pytest.raises(NotFoundError) as caught:
            client.models.retrieve("org/other")
        assert caught.value.code == "model_not_found"


def test_a_server_that_leaves_escapes_as_they_came(app: Flask) -> None:
    """A name that looks like an escape itself is still found by its own spelling."""
    client = app.test_client()
    for path, name in (("/v1/models/org%2Fmodel", "org/model"), ("/v1/models/50%2F50", "50%2F50")):
        shown: Any = client.get("/", environ_overrides={"PATH_INFO": path}).get_json()
        assert shown["id"] == name


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/chat/completions/", "/v1/completions/", "/v1/embeddings/"])
def test_a_slash_at_the_end_is_no_other_route(app: Flask, path: str) -> None:
    """Some clients join a base URL and a path with one slash too many; a redirect would lose a POST's body."""
    client = app.test_client()
    listing = client.get(path) if "models" in path else client.post(path, json={"messages": HELLO, "prompt": "Hello"})
    assert listing.status_code == (400 if "embeddings" in path else 200), listing.text


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions/", "/v1/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/models", "/v1/models"),
        ("/models/org/model", "/v1/models/org/model"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_base_url_without_the_prefix(app: Flask, path: str, right: str, method: str) -> None:
    """The commonest mistake of all gets an error that says what to change, in a form that clients show."""
    answer = app.test_client().open(path, method=method, headers={"x-request-id": "mine"})
    told: Any = answer.get_json()
    assert (answer.status_code, answer.headers["x-request-id"]) == (404, "mine")
    assert told["error"]["message"].endswith(f"use {right} instead.")


def test_routes_that_do_not_exist_are_answered_with_those_that_do(app: Flask) -> None:
    """A client whose default is another API of OpenAI's hears which ones are here."""
    told: Any = app.test_client().post("/v1/realtime/sessions", json={}).get_json()
    assert "/v1/chat/completions" in told["error"]["message"]


def test_an_apps_own_routes_go_first() -> None:
    """An app may have a route called /models, another prefix for the API, and a 404 page of its own."""
    with Bridge(ScriptedEngine()) as bridge:
        app = Flask(__name__)
        app.config["LMBRIDGE_MODELS"] = {"scripted": bridge}
        LMBridge(app)
        app.register_blueprint(blueprint, url_prefix="/llm")
        app.add_url_rule("/models", "shop", lambda: "a shop")
        app.register_error_handler(404, lambda error: ("lost", 404))
        client = app.test_client()
        assert client.get("/models").text == "a shop"
        assert client.get("/shop/models").text == "lost"
        assert "/llm/completions" in client.post("/completions").text
        assert "/llm/models" in client.get("/llm/nothing").text
