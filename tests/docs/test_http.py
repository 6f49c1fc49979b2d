"""The pages of docs/http show code that runs, and every key there is."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from lmbridge import Client
from lmbridge.flask import LMBridge, current_bridge, openai, rerank
from lmbridge.flask.config import KEYS
from lmbridge.flask.testing import scripted_encoder, scripted_engine
from tests.flask.conftest import on_werkzeug

FOLDER = Path(__file__).parents[2] / "docs" / "http"
BLOCK = re.compile(r"\.\. code-block:: python\n((?:   :.*\n)*)\n((?:(?:   .*)?\n)+)")


def blocks(page: str) -> list[tuple[str, str]]:
    """(options, source) of each Python block."""
    found = BLOCK.findall((FOLDER / page).read_text())
    return [(options.strip(), textwrap.dedent(source)) for options, source in found]


def run(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_the_app_answers_and_its_test_passes() -> None:
    """The factory answers through the bundled model, and the page's own tests pass."""
    asked = 'print(app.test_client().post("/ask", json={"prompt": "What is the capital of Kenya?"}).json)'
    page = "\n".join([source for _, source in blocks("flask.rst")])
    assert "Nairobi" in run("\n".join([page, "test_ask()", "test_embed()", asked]))


def test_every_key_is_in_the_table() -> None:
    """Whoever looks for a setting looks here."""
    shown = set(re.findall(r"\* - ``(LMBRIDGE_\w+)``", (FOLDER / "flask.rst").read_text()))
    assert shown == set(KEYS)


# --- what outlives a view ---


def test_a_thread_that_a_view_leaves_behind() -> None:
    """As the page on streaming says, it cannot ask without a request, and can with a client of its own."""
    app = Flask(__name__)
    app.config["LMBRIDGE_MODEL"] = "demo"
    lm = LMBridge(app)
    pool, over, told = ThreadPoolExecutor(2), threading.Event(), list[Future[Any]]()

    def ask_later(client: Client) -> str:
        assert over.wait(30)
        return client.infer("Hi", timeout=30).text

    @app.get("/")
    def view() -> str:
        told.extend([pool.submit(ask_later, client) for client in (current_bridge, lm.models.bridge().client("jobs"))])
        return "done"

    with scripted_engine(app), on_werkzeug(app) as url, pool:
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"done"
        over.set()
        assert type(told[0].exception(30)) is RuntimeError
        assert told[1].result(30) == "Hi"


# --- clients, which need a server ---


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The bundled model and two scripted encoders, under the names that the pages give them."""
    app = Flask(__name__)
    encoders = {name: {"model": "demo", "engine": "encoder"} for name in ("minilm", "ranker")}
    app.config["LMBRIDGE_MODELS"] = {"demo": "demo", **encoders}
    models = LMBridge(app)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(rerank.blueprint)
    with ExitStack() as stack:
        for name in encoders:
            stack.enter_context(scripted_encoder(app, name))
        yield stack.enter_context(on_werkzeug(app))
        with app.app_context():
            models.models.close()


def of_a_client(page: str, address: str) -> list[str]:
    """The page's blocks that need a server, with the one they need."""
    return [source.replace("http://127.0.0.1:8000", address) for options, source in blocks(page) if options]


@pytest.mark.long
def test_the_official_client(address: str) -> None:
    """The first client of the page is answered, whole and in a stream."""
    assert run(of_a_client("openai.rst", address)[0]).count("Paris") == 2


@pytest.mark.long
def test_responses(address: str) -> None:
    """The newer API answers the page's questions, one of them with an object of the class that it asks for."""
    text, person = run(of_a_client("responses.rst", address)[0]).splitlines()
    assert "Paris" in text
    assert person.startswith("name=")


@pytest.mark.long
def test_vectors(address: str) -> None:
    """The official client gets a vector for each text."""
    embed, _ = of_a_client("vectors.rst", address)
    assert run(f"{embed}\nprint(len(vectors))") == "2\n"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # litellm warns of its own types
def test_ranks(address: str) -> None:
    """Cohere's and litellm's clients rank the page's documents."""
    pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")
    pytest.importorskip("litellm", reason="needs litellm: pip install litellm")
    names: dict[str, Any] = {}
    exec(of_a_client("vectors.rst", address)[1], names)
    assert names["best"] in names["documents"]
    assert len(names["answer"].results) == 2
