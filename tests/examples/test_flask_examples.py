"""The Flask examples that docs/http/streaming.rst shows: over real HTTP, and one of them in a browser."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lmbridge import PromptTooLongError
from lmbridge.flask.models import models_of
from lmbridge.flask.testing import scripted_engine
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.flask.conftest import on_serve, on_werkzeug
from tests.flask.page.conftest import browser  # noqa: F401

if TYPE_CHECKING:
    from flask import Flask
    from playwright.sync_api import Browser

    from tests.examples.conftest import StartExample

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 30.0  # seconds after which a test is taken to hang
CAPITAL, OPPOSITE = "What is the capital of Peru?", "What is the opposite of hot?"


def app_of(name: str) -> Flask:
    """The app of an example, which is a script and not in any package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # by which Flask finds the files beside it
    spec.loader.exec_module(module)
    found: Flask = module.app
    return found


@contextmanager
def served(name: str, serve: Any = on_werkzeug, **options: Any) -> Iterator[tuple[str, ScriptedEngine, Flask]]:
    """An example with a scripted engine, on a real server."""
    app = app_of(name)
    with scripted_engine(app, **options) as engine, serve(app) as url:
        yield url, engine, app


def opened(url: str, *prompts: str) -> HTTPResponse:
    """The answer to a form with these prompts, or to a GET without any."""
    body = urllib.parse.urlencode([("prompt", prompt) for prompt in prompts]).encode()
    answer: HTTPResponse = urllib.request.urlopen(url, body or None, timeout=PATIENCE)
    return answer


def ask(url: str, *prompts: str) -> str:
    with opened(url, *prompts) as answer:
        return answer.read().decode()


def events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]


def texts_of(body: str) -> list[str]:
    return [event["text"] for event in events(body) if "text" in event]


def test_a_stream_of_events() -> None:
    """A browser that reads the events gets each piece as the model makes it, and how the answer ended."""
    with served("flask_streaming", manual=True) as (url, engine, _), opened(f"{url}/events", "one two") as answer:
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        while not (line := answer.readline()).startswith(b"data"):
            assert line
        assert events(line.decode()) == [{"text": "one"}]
        engine.step(2)
        rest = events(answer.read().decode())
    assert rest[0] == {"text": " two"}
    assert rest[-1]["finish_reason"] == "stop"


def test_an_error_before_and_within_a_stream() -> None:
    """A refusal has its status; what fails later is an event, or breaks a plain body off: it never looks whole."""
    with served("flask_streaming", on_serve, manual=True) as (url, engine, _):
        for path in ("/events", "/text"):
            assert "empty" in refusal(url + path, "")
            engine.refuse("long", PromptTooLongError("It is too long."))  # which only the engine knows
            assert "too long" in refusal(url + path, "long")
        assert events(failing(engine, f"{url}/events", "fox b"))[-1]["type"] == "EngineError"
        with pytest.raises(IncompleteRead):
            failing(engine, f"{url}/text", "fox d")


def refusal(url: str, *prompts: str) -> str:
    """The error of a form that is answered 400."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        opened(url, *prompts)
    with refused.value:
        assert refused.value.code == 400
        return str(json.load(refused.value)["error"])


def failing(engine: ScriptedEngine, url: str, prompt: str) -> str:
    """What comes of an answer that fails after its first word, "fox", has been read."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(opened, url, prompt)
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        with answer.result(PATIENCE) as reply:
            begun = b""
            while b"fox" not in begun:
                begun += reply.read1()
            engine.fail(prompt, ValueError("as told"))
            engine.step()
            return (begun + reply.read()).decode()


def test_a_reader_that_leaves() -> None:
    """Whoever closes the tab stops the model."""
    with served("flask_streaming", manual=True) as (url, engine, _):
        answer = opened(f"{url}/events", "a b c")
        engine.wait_for(lambda engine: engine.active == 1)
        answer.close()
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 1


def test_several_questions() -> None:
    """Each answer is to its own question, whichever way they were asked, and those asked at once run at once."""
    with served("flask_several", manual=True) as (url, engine, _), ThreadPoolExecutor(1) as pool:
        for path in ("/at-once", "/stream"):
            answer = pool.submit(ask, url + path, "one", "two")
            engine.wait_for(lambda engine: engine.active == 2)
            engine.step()
            body = answer.result(PATIENCE)
            texts = json.loads(body) if path == "/at-once" else texts_of(body)
            assert texts == ["one", "two"]
    with served("flask_several") as (url, engine, _):
        assert ask(f"{url}/in-turn", "one", "", "two") == "one\nThe prompt is empty.\ntwo\n"
        engine.refuse("long", PromptTooLongError("It is too long."))
        assert "too long" in refusal(f"{url}/in-turn", "long", "two")


def test_a_job_outlives_its_view() -> None:
    """The job goes on when the view has returned and its connection is closed; until then there are no texts."""
    with served("flask_background", manual=True) as (url, engine, app):
        with opened(f"{url}/jobs", "one", "two") as answer:
            assert (answer.status, json.load(answer)) == (202, {"job": 0})
        engine.wait_for(lambda engine: engine.active == 1)
        assert json.loads(ask(f"{url}/jobs/0")) == {"texts": None}
        (living,) = models_of(app).bridge().requests()
        assert living.client == "jobs"
        engine.step()
        engine.wait_for(lambda engine: len(engine.started) == 2 and engine.active == 1)
        engine.step()
        until(lambda: json.loads(ask(f"{url}/jobs/0")) == {"texts": ["one", "two"]})


def test_jobs_are_forgotten() -> None:
    """A job that nobody started would be a fault of the server, or old ones would fill the memory."""
    with served("flask_background") as (url, _, _):
        sys.modules["flask_background"].KEPT = 1  # type: ignore[attr-defined]
        for number in range(2):
            assert json.loads(ask(f"{url}/jobs", "one")) == {"job": number}
        until(lambda: json.loads(ask(f"{url}/jobs/1")) == {"texts": ["one"]})
        for number in (0, 99):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(f"{url}/jobs/{number}")


@pytest.mark.long
def test_jobs_that_wait_at_the_end(start_example: StartExample, tmp_path: Path) -> None:
    """Ctrl-C would lose the jobs that were accepted and not begun."""
    told = "import atexit\natexit.register(lambda: print(*[job.result() for job in jobs.values()]))\n"
    (tmp_path / "program.py").write_text((EXAMPLES / "flask_background.py").read_text() + told)
    with start_example(str(tmp_path / "program.py"), "0") as server:
        url = listening_url(server)
        for _ in range(8):  # of which four begin at once
            ask(f"{url}/jobs", CAPITAL)
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        assert out.count("Lima") == 8, err


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "path", "answers"),
    [
        ("streaming", "text", {CAPITAL: "Lima", OPPOSITE: "cold"}),
        ("several", "at-once", {CAPITAL: "Lima", OPPOSITE: "cold"}),
        ("background", "jobs", {CAPITAL: '"job":0'}),
    ],
)
def test_as_it_is_run(start_example: StartExample, name: str, path: str, answers: dict[str, str]) -> None:
    """``python examples/NAME.py`` serves the bundled model, and Ctrl-C ends it, a running job or not."""
    with start_example(f"flask_{name}.py", "0") as server:
        url = listening_url(server)
        for question, answer in answers.items():
            assert answer in ask(f"{url}/{path}", question)
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
        assert "Traceback" not in err


def listening_url(server: subprocess.Popen[str]) -> str:
    """Where Flask says that it listens; the test's own timeout bounds the wait."""
    assert server.stderr
    for line in server.stderr:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return found[0]
    raise AssertionError("The example has ended.")


@pytest.mark.long
def test_the_page_in_a_browser(browser: Browser) -> None:  # noqa: F811
    """The page that a reader copies shows the words as they come, stops the model, and shows what failed."""
    with served("flask_streaming", manual=True) as (url, engine, _):
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("textbox").fill("one two three")
        page.get_by_role("button", name="Ask").click()
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        page.wait_for_function("document.querySelector('p').textContent === 'one'")
        page.get_by_role("button", name="Stop").click()
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 1
        page.get_by_role("textbox").fill("")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_function("document.querySelector('p').textContent.includes('prompt is empty')")
        page.close()
