"""The official OpenAI client against every server in docs/http/servers.rst, with the bundled model behind it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask import Flask
from openai import OpenAI

from lmbridge import Bridge
from lmbridge.flask import LMBridge
from lmbridge.flask.openai import blueprint
from tests.flask.conftest import Ends, on_gunicorn, on_serve, on_waitress, on_werkzeug

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi"}
SERVERS = {"werkzeug": on_werkzeug, "waitress": on_waitress, "serve": on_serve}
PATIENCE = 60.0  # seconds after which a test is taken to hang
GUNICORN = """
    from flask import Flask
    from lmbridge.flask import LMBridge
    from lmbridge.flask.openai import blueprint

    app = Flask(__name__)
    app.config["LMBRIDGE_MODEL"] = "demo"
    lm = LMBridge(app)
    app.register_blueprint(blueprint)

    from tests.flask.conftest import Ends

    ends = Ends()

    @app.get("/ended/<int:count>")
    def ended(count):
        return {"ended": ends.wait_for(count), "running": lm.models.bridge().health().running}
"""


@pytest.fixture(scope="module")
def bridge() -> Iterator[Bridge]:
    with Bridge("demo", when_full="reject") as bridge:
        yield bridge


@contextmanager
def serving(name: str, bridge: Bridge, folder: Path) -> Iterator[str]:
    """The URL of a server of that name; gunicorn has a bridge of its own, in its worker."""
    if name == "gunicorn":
        with on_gunicorn(folder, GUNICORN) as url:
            yield url
        return
    app = Flask(__name__)
    app.config["LMBRIDGE_MODELS"] = {"demo": bridge}
    lm = LMBridge(app)
    app.register_blueprint(blueprint)

    ends = Ends()

    @app.get("/ended/<int:count>")
    def ended(count: int) -> dict[str, int]:
        return {"ended": ends.wait_for(count), "running": lm.models.bridge().health().running}

    with contextlib.closing(ends), SERVERS[name](app) as url:
        yield url


def running(url: str, ended: int) -> int:
    """How many requests run once ``ended`` have ended."""
    with urllib.request.urlopen(f"{url}/ended/{ended}", timeout=PATIENCE) as answer:
        found = json.loads(answer.read())
        assert found["ended"]
        return int(found["running"])


@pytest.mark.parametrize("name", ["werkzeug", "gunicorn", "waitress", "serve"])
def test_openai_client(name: str, bridge: Bridge, tmp_path: Path) -> None:
    """Whole answers, streams, a crowd of both, and a stream that is left: the same on each server."""
    with serving(name, bridge, tmp_path) as url, OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:

        def chat(country: str) -> str:
            question = f"What is the capital of {country}?"
            answer = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": question}], temperature=0
            )
            return answer.choices[0].message.content or ""

        def stream(country: str) -> str:
            question = f"What is the capital of {country}?"
            with client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": question}], temperature=0, stream=True
            ) as chunks:
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(8) as pool:
            answers = [(country, pool.submit(ask, country)) for country in CAPITALS for ask in (chat, stream)]
            for country, answer in answers:
                assert CAPITALS[country] in answer.result(60)

        with client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Write a long story about a fox."}],
            stream=True,
            extra_body={"ignore_eos": True},
        ) as chunks:
            next(iter(chunks))
        assert running(url, 2 * len(CAPITALS) + 1) == 0
