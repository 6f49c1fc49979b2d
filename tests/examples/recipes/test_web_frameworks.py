"""The recipes for Django and FastAPI, under the servers that their users run."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmbridge import QueueFullError
from tests.examples.recipes.conftest import RECIPES, Serve, free_port, get, needs

ANSWERS = {
    "What is the capital of France?": "Paris",
    "What is 37 + 48?": "85",
    "What is the opposite of hot?": "cold",
    "Tell me a story about a whale.": "whale",
}


def everybody_is_answered(port: int, *paths: str) -> None:
    asked = [(path, prompt) for path in paths for prompt in ANSWERS]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda one: get(port, *one), asked)
    for (path, prompt), (status, text) in zip(asked, answers, strict=True):
        assert (status, ANSWERS[prompt] in text) == (200, True), (path, prompt, text)


def bad_prompts_are_refused(port: int, *paths: str) -> None:
    for path in paths:
        for prompt in ("", "fox " * 2000):  # the second is too long, which only the engine knows
            status, text = get(port, path, prompt)
            assert (status, "prompt" in text) == (400, True), (path, prompt[:10], text)


def late(recipe: str, folder: Path) -> None:
    """A copy of a recipe whose deadlines have passed when the model begins."""
    source = (RECIPES / recipe).read_text()
    assert "timeout=60" in source
    (folder / recipe).write_text(source.replace("timeout=60", "timeout=0.001"))


@needs("django")
@pytest.mark.long
def test_django_and_its_reloader(serve: Serve, tmp_path: Path) -> None:
    """Saving a file would leave Django's development server without a model, or with two."""
    program = tmp_path / "django_app.py"
    shutil.copy(RECIPES / "django_app.py", program)
    port = free_port()
    server = serve(str(program), "runserver", str(port))
    server.until("Starting development server")
    everybody_is_answered(port, "ask", "tell")
    bad_prompts_are_refused(port, "ask", "tell")
    program.write_text(program.read_text().replace('{"text"', '{"said"'))
    server.until("Starting development server", times=2)
    assert get(port, "ask", "What is 2 + 3?") == (200, '{"said": "2 + 3 = 5."}')
    server.stop()
    assert "Traceback" not in server.output


@needs("django", "gunicorn")
@pytest.mark.long
def test_django_under_gunicorn(serve: Serve) -> None:
    """The line for gunicorn that the recipe gives would serve nobody, with --preload too."""
    port = free_port()
    options = ["-k", "gthread", "--threads", "16", "--preload", "-b", f"127.0.0.1:{port}"]
    server = serve("-m", "gunicorn", *options, "django_app:application")
    server.until("Booting worker")
    everybody_is_answered(port, "ask", "tell")
    assert server.stop() == 0, server.output


@needs("django", "uvicorn")
@pytest.mark.long
def test_django_on_asgi(serve: Serve) -> None:
    """Django's asynchronous views would stream nothing, or all at once."""
    port = free_port()
    server = serve("-m", "uvicorn", "--port", str(port), "django_app:asgi")
    server.until("Uvicorn running")
    everybody_is_answered(port, "ask", "tell-async")
    bad_prompts_are_refused(port, "ask", "tell-async")
    server.stop()
    assert "Traceback" not in server.output


@needs("fastapi", "uvicorn")
@pytest.mark.long
def test_fastapi(serve: Serve) -> None:
    """Coroutines and functions would not share one model, or a shutdown would leave it running."""
    port = free_port()
    server = serve("-m", "uvicorn", "--port", str(port), "fastapi_app:app")
    server.until("Uvicorn running")
    everybody_is_answered(port, "ask", "ask-in-a-thread", "ask-while-there", "tell")
    bad_prompts_are_refused(port, "ask", "ask-in-a-thread", "ask-while-there", "tell")
    server.stop()
    assert "Application shutdown complete" in server.output
    assert "Traceback" not in server.output


@needs("django", "fastapi", "uvicorn")
@pytest.mark.long
@pytest.mark.parametrize(("app", "stream"), [("fastapi_app:app", "tell"), ("django_app:asgi", "tell-async")])
def test_a_deadline_has_its_status(serve: Serve, tmp_path: Path, app: str, stream: str) -> None:
    """A client would take a deadline that has passed for a server that is down, and ask again."""
    late(app.partition(":")[0] + ".py", tmp_path)
    port = free_port()
    server = serve("-m", "uvicorn", "--port", str(port), app, cwd=tmp_path)
    server.until("Uvicorn running")
    for path in ("ask", stream):
        assert get(port, path, "Tell me a story about a fox.")[0] == 504


@needs("fastapi")
@pytest.mark.long
def test_a_full_queue_has_its_status() -> None:
    """A client would take a full queue for a server that is down."""
    spec = importlib.util.spec_from_file_location("fastapi_app", RECIPES / "fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert asyncio.run(recipe.refuse(None, QueueFullError("full"))).status_code == 429
