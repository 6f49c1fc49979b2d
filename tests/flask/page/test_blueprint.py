"""The page as an app serves it, without a browser."""

from __future__ import annotations

import pytest
from flask import Flask

from lmbridge import Bridge
from lmbridge.flask import LMBridge, openai, playground
from lmbridge.testing import ScriptedEngine


@pytest.fixture
def app() -> Flask:
    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODEL=Bridge(ScriptedEngine()), TESTING=True)
    LMBridge(app)
    app.register_blueprint(playground.blueprint)
    return app


def test_says_which_blueprint_is_missing(app: Flask) -> None:
    """An app with the page alone does not show a page that cannot work."""
    with pytest.raises(RuntimeError, match=r"register_blueprint\(lmbridge.flask.openai.blueprint"):
        app.test_client().get("/")


def test_lives_without_status(app: Flask) -> None:
    """An app without the operations blueprint gets the page without its live panel."""
    app.register_blueprint(openai.blueprint)
    html = app.test_client().get("/").text
    assert "Settings" in html
    assert "Live" not in html


@pytest.mark.parametrize("path", ["/", "/playground/page.js", "/playground/page.css", "/playground/icon.svg"])
def test_runs_nothing_but_its_own(app: Flask, path: str) -> None:
    """A script that got into the page would not run, and other sites cannot frame it."""
    app.register_blueprint(openai.blueprint)
    with app.test_client().get(path) as response:
        assert response.status_code == 200
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_tells_the_bundled_model() -> None:
    """The page knows whom it may ask what the bundled model knows: that model alone, whatever others are called."""
    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODELS={"small": "demo", "demo": Bridge(ScriptedEngine())}, TESTING=True)
    LMBridge(app)
    app.register_blueprint(openai.blueprint)
    told = app.test_client().get("/v1/models").get_json()["data"]
    assert [model.get("lmbridge", {}).get("bundled") for model in told] == [True, None]
