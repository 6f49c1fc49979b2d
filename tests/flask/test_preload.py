"""When an app loads its models, and what its console shows meanwhile."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from flask import Flask

from lmbridge import Bridge
from lmbridge.flask import LMBridge, current_bridge, loading
from lmbridge.flask.models import models_of
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.flask.conftest import on_waitress
from tests.flask.processes import get, on_gunicorn, running

APP = """
    import asyncio
    from pathlib import Path

    from flask import Flask, request
    from lmbridge import Bridge
    from lmbridge.flask import LMBridge, current_bridge
    from lmbridge.flask.operations import blueprint
    from lmbridge.testing import ScriptedEngine

    class Slow(ScriptedEngine):
        async def start(self):
            if (gate := Path("gate")).exists():  # a pipe, which opens once the test opens it too
                await asyncio.to_thread(gate.read_text)
            await super().start()

    def broken():
        raise RuntimeError("the weights are gone")

    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODEL={model}, LMBRIDGE_PRELOAD={preload})
    lm = LMBridge(app)
    app.register_blueprint(blueprint)

    @app.get("/ask")
    def ask():
        return current_bridge.infer(request.args.get("prompt")).text
"""
PRELOADS = APP.format(model="Slow", preload=True)
LAZY = APP.format(model="Slow", preload=False)
FLASK = ["flask", "--app", "served", "run", "--port", "0"]


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_a_worker_loads_as_it_starts(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The worker, and not gunicorn's master, loads before anybody asks, and probes are answered meanwhile."""
    os.mkfifo(tmp_path / "gate")
    with on_gunicorn(tmp_path, PRELOADS, *options) as (process, url):
        loads = process.wait_for(r"INFO .*Loading the model default in process (\d+)")[1]
        status, body, headers = get(f"{url}/ready")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body)["models"]["default"]["state"] == "starting"
        assert get(f"{url}/health")[0] == 200
        (tmp_path / "gate").write_text("")
        process.wait_for(r"default is ready after [\d.]+ s: scripted")
        assert get(f"{url}/ready")[0] == 200
        assert get(f"{url}/ask?prompt=hello")[1] == "hello"
        assert process.end() == 0
    assert f"Booting worker with pid: {loads}\n" in process.printed
    assert process.printed.count("Loading the model") == 1
    assert "WARNING" not in process.printed
    assert "not closed" not in process.printed


def test_a_model_that_cannot_be_loaded_ends_no_worker(tmp_path: Path) -> None:
    """The worker stays and says why, rather than be started again and again."""
    with on_gunicorn(tmp_path, APP.format(model="broken", preload=True)) as (process, url):
        process.wait_for("the weights are gone")
        status, body, _ = get(f"{url}/health")
        assert (status, json.loads(body)["status"]) == (503, "failed")
        assert "the weights are gone" in json.loads(body)["faults"]["default"]
        assert get(f"{url}/ask?prompt=hello")[0] == 503
        assert process.end() == 0
    assert process.printed.count("Booting worker") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(["-w", "2"], "runs several processes, each with its own copy", marks=pytest.mark.long),
        pytest.param(["-k", "sync"], "handles one request at a time", marks=pytest.mark.long),
        (["-k", "sync", "-w", "2"], "runs several processes, .*, and handles one request at a time"),
    ],
)
def test_a_server_that_does_not_suit_is_told_once(tmp_path: Path, options: list[str], told: str) -> None:
    """Whoever starts several workers, or one without threads, learns it from the first request, not from a bill."""
    with on_gunicorn(tmp_path, LAZY, *options, "--threads", "1" if "sync" in options else "8") as (process, url):
        assert [get(f"{url}/ask?prompt=hello")[1] for _ in range(4)] == ["hello"] * 4
        process.wait_for(f"WARNING .*The server {told}.* Run one process with threads: gunicorn -w 1 -k gthread")
        process.end()
    assert process.printed.count("Run one process") <= (2 if "-w" in options else 1)  # once in each process


@pytest.mark.long
def test_workers_of_another_server_are_no_copies(tmp_path: Path) -> None:
    """Many processes may share a server of models elsewhere; a warning would send its owner the wrong way."""
    with on_gunicorn(tmp_path, APP.format(model="'http://127.0.0.1:9/v1'", preload=False), "-w", "2") as (process, url):
        assert get(f"{url}/ask?prompt=hello")[0] == 503
        process.end()
    assert "Run one process" not in process.printed


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--debug",)])
def test_flask_run_loads_once(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The reloader's parent loads nothing, the developer sees the lines, and Ctrl-C ends it without a word."""
    with running(tmp_path, PRELOADS, *FLASK, *options) as process:
        url = process.wait_for(r"Running on (http://\S+)")[1]
        assert get(f"{url}/ask?prompt=hello")[1] == "hello"
        assert process.end(signal.SIGINT) == 0
    assert process.printed.count("is ready after") == 1
    assert process.printed.count("Loading the model") == 1
    assert "Traceback" not in process.printed
    assert "not closed" not in process.printed


@pytest.mark.long
def test_other_commands_load_nothing(tmp_path: Path) -> None:
    """``flask routes``, a shell or a migration must not wait for a model, nor take its memory."""

    with running(tmp_path, PRELOADS, "flask", "--app", "served", "routes") as process:
        assert process.wait() == 0
    assert "/ask" in process.printed
    assert "Loading" not in process.printed


@pytest.mark.long
def test_a_module_may_preload_by_itself(tmp_path: Path) -> None:
    """``lm.preload(app)`` in a module that gunicorn imports before it forks loads in the worker all the same."""
    with on_gunicorn(tmp_path, LAZY + "\n    lm.preload(app)\n", "--preload") as (process, _):
        loads = process.wait_for(r"Loading the model default in process (\d+)")[1]
        process.wait_for("is ready after")
        assert process.end() == 0
    assert f"Booting worker with pid: {loads}\n" in process.printed


@pytest.mark.long
def test_what_else_is_forked_loads_nothing(tmp_path: Path) -> None:
    """A process pool that the app starts in gunicorn's master takes no memory for models."""
    forks = "import multiprocessing; multiprocessing.get_context('fork').Pool(3).map(abs, range(9))"
    source = f"{PRELOADS}\n    {forks}\n"
    with on_gunicorn(tmp_path, source, "--preload") as (process, _):
        process.wait_for("is ready after")
        process.end()
    assert process.printed.count("Loading the model") == 1


@pytest.mark.long
def test_a_configured_log_has_each_line_once(tmp_path: Path) -> None:
    """An app that sets up logging, be it after the extension, gets our lines in its own form, and no second time."""
    source = PRELOADS + "\n    import logging\n    logging.basicConfig(level='INFO', format='OWN %(message)s')\n"
    os.mkfifo(tmp_path / "gate")
    with running(tmp_path, source, "waitress", "--listen", "127.0.0.1:0", "served:app") as process:
        process.wait_for("Serving on")
        (tmp_path / "gate").write_text("")
        process.wait_for("OWN default is ready after")
        process.end()
    assert process.printed.count("is ready after") == 1


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_while_it_loads(tmp_path: Path, number: int) -> None:
    """A deployment that is taken back at once must not wait for the model, here the bundled one, nor crash under it."""
    with on_gunicorn(tmp_path, APP.format(model="'demo'", preload=True)) as (process, url):
        process.wait_for("Loading the model")
        assert get(f"{url}/health")[0] == 200
        assert process.end(number) == 0
    assert "Traceback" not in process.printed


@pytest.mark.long
def test_a_bridge_of_a_module_ends_with_its_app(tmp_path: Path) -> None:
    """A Bridge that a module makes for its app is nobody's to close; the process's end closes it without a word."""
    with on_gunicorn(tmp_path, APP.format(model="Bridge(Slow)", preload=True)) as (process, _):
        process.wait_for("is ready after")
        assert process.end() == 0
    assert "not closed" not in process.printed


# --- in this process ---


def build(model: object, **config: object) -> tuple[LMBridge, Flask]:
    app = Flask("served")
    app.config.update(LMBRIDGE_MODEL=model, **config)
    lm = LMBridge(app)

    @app.get("/ask")
    def ask() -> str:
        return current_bridge.infer("hello").text

    return lm, app


def test_a_first_request_that_waits_is_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a first answer sees in the log that a model is being loaded, and goes on being loaded."""
    caplog.set_level(logging.INFO, "lmbridge")
    monkeypatch.setattr(loading, "NEWS", 0.05)
    gate = threading.Event()

    def slow() -> ScriptedEngine:
        gate.wait(30)
        return ScriptedEngine()

    lm, app = build(slow)
    asking = threading.Thread(target=app.test_client().get, args=("/ask",))
    asking.start()
    until(lambda: "Still loading default after" in caplog.text)
    gate.set()
    asking.join(30)
    until(lambda: "default is ready after" in caplog.text)
    assert app.test_client().get("/ask").text == "hello"
    assert caplog.text.count("Loading the model default in process") == 1
    assert "WARNING" not in caplog.text  # a test is no server
    lm.close(app)


def test_an_environment_that_cannot_work_is_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong before anything is loaded, such as gevent's threads, is not lost with the thread that found it."""
    patched = type(sys)("gevent.monkey")
    patched.is_module_patched = lambda name: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gevent.monkey", patched)
    lm, app = build(ScriptedEngine)
    lm.preload(app)
    until(lambda: "Loading the model default failed: threading is patched by gevent" in caplog.text)


def test_a_program_of_ones_own_is_told_how(caplog: pytest.LogCaptureFixture) -> None:
    """LMBRIDGE_PRELOAD without effect says so at the first request, rather than be believed."""
    lm, app = build(ScriptedEngine, LMBRIDGE_PRELOAD=True)
    with on_waitress(app) as url:
        assert get(f"{url}/ask")[1] == "hello"
    assert caplog.text.count("call lm.preload(app)") == 1
    lm.close(app)


def test_models_close_together() -> None:
    """An app with several models ends within the time of one; each of them would hold up a restart for its own."""
    together = threading.Barrier(3)

    class Sociable(ScriptedEngine):
        async def close(self) -> None:
            together.wait(5)  # all have been told before any is waited for
            await super().close()

    lm, app = LMBridge(), Flask("several")
    app.config["LMBRIDGE_MODELS"] = dict.fromkeys(("one", "two", "three"), Sociable)
    lm.init_app(app)
    with app.app_context():
        for name in ("one", "two", "three"):
            lm.models.bridge(name).start()
    lm.close(app)
    assert not together.broken


def test_preload_and_close_need_no_context(caplog: pytest.LogCaptureFixture) -> None:
    """A program of one's own loads before it serves and drains when it ends, outside of every request."""
    caplog.set_level(logging.INFO, "lmbridge")
    lm, app = build(ScriptedEngine, LMBRIDGE_PRELOAD=True)
    bridge = models_of(app).bridge()
    assert bridge.health().state == "new"
    lm.preload(app)
    lm.preload(app)
    until(lambda: "default is ready after" in caplog.text)
    assert caplog.text.count("Loading the model") == 1
    with on_waitress(app) as url:
        assert get(f"{url}/ask")[1] == "hello"
    assert "lm.preload" not in caplog.text
    lm.close(app, drain=True)
    assert bridge.state == "closed"


def test_an_owner_keeps_what_he_handed_in() -> None:
    """``lm.close`` ends what the app has built, and nothing that others use."""
    with Bridge(ScriptedEngine) as bridge:
        lm, app = build(bridge)
        lm.close(app)
        assert bridge.infer("still here").text == "still here"
