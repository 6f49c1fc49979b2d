"""The extension as an app's author meets it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
from flask import Flask, Response, request

from lmbridge import Bridge, EngineError, InvalidRequestError, ModelNotFoundError, Stream, function_engine
from lmbridge.flask import LMBridge, answered, current_bridge, failed
from lmbridge.flask.config import KEYS, served_name
from lmbridge.flask.models import models_of
from lmbridge.flask.testing import scripted_engine
from lmbridge.testing import ScriptedEncoder, ScriptedEngine, prompt_text

lm = LMBridge()


def create_app(**config: Any) -> Flask:
    """An app as its author writes it, from a factory, with one extension object for all apps."""
    app = Flask(__name__)
    app.config.update({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_TIMEOUT": 20.0, **config})
    lm.init_app(app)

    @app.post("/ask")
    def ask() -> dict[str, str]:
        return {"text": current_bridge.infer(request.get_json().get("prompt", "")).text}

    @app.post("/tell")
    def tell() -> Response:
        return lm.stream_response(current_bridge.stream(request.get_json().get("prompt", "")))

    @app.post("/begin")
    def begin() -> Response:
        """Sends something as soon as the model has been asked."""
        stream = current_bridge.stream(request.get_json()["prompt"])
        return Response(itertools.chain(["begun: "], (delta.text for delta in stream)))

    @app.post("/tell/many")
    def tell_many() -> Response:
        return lm.stream_response(current_bridge.stream_many(request.get_json()["prompts"]))

    return app


@pytest.fixture
def app() -> Iterator[Flask]:
    app = create_app()
    yield app
    models_of(app).close()


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a whole response, comments left out."""
    blocks = response.get_data(as_text=True).split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data: ")]


def test_a_view_asks_the_bundled_model(app: Flask) -> None:
    """The README's first view: a prompt in, a text out."""
    answer = app.test_client().post("/ask", json={"prompt": "What is the capital of France?"})
    assert "Paris" in answer.get_json()["text"]


def test_a_view_streams(app: Flask) -> None:
    """Events arrive in order, join to the answer, and end with how it ended and what it took."""
    answer = app.test_client().post("/tell", json={"prompt": "What is the capital of France?"})
    assert answer.mimetype == "text/event-stream"
    assert answer.headers["X-Accel-Buffering"] == "no"
    *texts, end = events(answer)
    assert "Paris" in "".join(event["text"] for event in texts)
    assert end["finish_reason"] == "stop"
    assert end["usage"]["completion_tokens"] > 0


def test_a_view_streams_several_answers(app: Flask) -> None:
    """Each event says which answer it belongs to."""
    with scripted_engine(app):
        got = events(app.test_client().post("/tell/many", json={"prompts": ["a b c", "d e"]}))
    texts = ["".join(event.get("text", "") for event in got if event["index"] == index) for index in (0, 1)]
    assert texts == ["a b c", "d e"]


def test_requests_run_in_one_batch(app: Flask) -> None:
    """The point of the library: views that run at once are generated together."""
    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(app.test_client().post, "/ask", json={"prompt": f"word {n}"}) for n in range(8)]
        engine.wait_for(lambda engine: engine.active == 8)
        engine.step(2)
        assert [answer.result(10).get_json()["text"] for answer in answers] == [f"word {n}" for n in range(8)]


def test_several_models_and_several_apps() -> None:
    """Names belong to an app; two apps of one factory share nothing."""
    first, second = ScriptedEngine(script=lambda _: ["first"]), ScriptedEngine(script=lambda _: ["second"])
    with Bridge(first) as one, Bridge(second) as two:
        both = Flask("both")
        both.config["LMBRIDGE_MODELS"] = {"one": one, "two": two}
        lm.init_app(both)
        other = Flask("other")
        other.config["LMBRIDGE_MODEL"] = two
        lm.init_app(other)
        with both.test_request_context():
            assert [lm.bridge(name).infer("x").text for name in ("one", "two", None)] == ["first", "second", "first"]
            with pytest.raises(ModelNotFoundError, match="one, two"):
                lm.bridge("three")
        with other.test_request_context():
            assert current_bridge.infer("x").text == "second"


@pytest.mark.parametrize("source", [ScriptedEngine, ScriptedEngine(), {"LMBRIDGE_MODELS": {"default": ScriptedEngine}}])
def test_an_engine_as_the_model(source: Any) -> None:
    """What a Bridge takes as its model, an app takes too."""
    app = create_app(**({"LMBRIDGE_MODEL": None} | source if isinstance(source, dict) else {"LMBRIDGE_MODEL": source}))
    assert models_of(app).names() == ["default"]
    assert app.test_client().post("/ask", json={"prompt": "hello"}).get_json()["text"] == "hello"
    models_of(app).close()


def test_a_function_as_the_model() -> None:
    """A function that answers prompts, or lists of items, is shared by views without a Bridge of one's own."""
    shared = function_engine(lambda words: [word.upper() for word in words])
    app = create_app(LMBRIDGE_MODEL=shared)
    with app.app_context():
        assert current_bridge.call("hello") == "HELLO"
    models_of(app).close()


def test_the_app_leaves_a_bridge_that_was_handed_in_to_its_owner() -> None:
    """Closing the app must not end a bridge that others use too."""
    with Bridge(ScriptedEngine()) as bridge:
        app = create_app(LMBRIDGE_MODEL=bridge)
        models_of(app).close()
        assert bridge.infer("still here").text == "still here"


def test_initialised_twice_is_refused(app: Flask) -> None:
    """A second set of models would load the weights twice."""
    with pytest.raises(RuntimeError, match="already"):
        lm.init_app(app)


def test_not_initialised_says_so() -> None:
    """The commonest mistake gets the question that finds it."""
    with Flask("bare").app_context(), pytest.raises(RuntimeError, match="did you forget"):
        current_bridge.infer("x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "LMBRIDGE_MODEL"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_MODELS": {"a": "demo"}}, "Set either"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_TIMEOUTS": 3}, "did you mean LMBRIDGE_TIMEOUT"),
        ({"LMBRIDGE_MODEL": 3}, "LMBRIDGE_MODEL must be a model's name or folder, an Engine, a function"),
        ({"LMBRIDGE_MODEL": lambda texts: texts}, "function_engine"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_PRELOAD": "yes"}, "LMBRIDGE_PRELOAD must be True or False"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_TIMEOUT": -1}, "LMBRIDGE_TIMEOUT must be seconds > 0"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_MAX_PENDING": True}, "LMBRIDGE_MAX_PENDING must be an int"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_WHEN_FULL": "wait"}, "'block' or 'reject'"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_ENGINE_OPTIONS": {"max_batch": 3}}, "no option 'max_batch'"),
        ({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_API_KEYS_FILE": "/nowhere/keys"}, "cannot be read"),
        ({"LMBRIDGE_MODELS": {"a": {"engine": "transformers"}}}, "has no 'model'"),
        ({"LMBRIDGE_MODELS": {"a": {"model": "demo", "timeout": 5}}}, "set LMBRIDGE_TIMEOUT"),
    ],
)
def test_wrong_configuration_is_refused_at_once(config: dict[str, Any], message: str) -> None:
    """A misspelt key found at the first request, or never, is a bad night for somebody."""
    app = Flask("wrong")
    app.config.update(config)
    with pytest.raises(InvalidRequestError, match=message):
        LMBridge(app)


def test_an_empty_file_of_keys_opens_no_door(tmp_path: Any) -> None:
    """No keys means everybody; a file that was emptied by accident must not."""
    keys = tmp_path / "keys"
    keys.write_text("# nobody yet\n")
    app = Flask("locked")
    app.config.update(LMBRIDGE_MODEL="demo", LMBRIDGE_API_KEYS_FILE=str(keys))
    with pytest.raises(InvalidRequestError, match="contains no key"):
        LMBridge(app)


def test_keys_from_environment_variables_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """``FLASK_LMBRIDGE_…`` in a container is how many apps are configured."""
    monkeypatch.setenv("FLASK_LMBRIDGE_MODEL", "demo")
    monkeypatch.setenv("FLASK_LMBRIDGE_TIMEOUT", "30")
    monkeypatch.setenv("FLASK_LMBRIDGE_API_KEYS", "one, two")
    (tmp_path / "keys").write_text("# ours\nthree\n")
    monkeypatch.setenv("FLASK_LMBRIDGE_API_KEYS_FILE", str(tmp_path / "keys"))
    app = Flask("env")
    app.config.from_prefixed_env()
    LMBridge(app)
    settings = models_of(app).settings
    assert (settings.timeout, settings.api_keys) == (30.0, ("one", "two", "three"))


def test_the_keys_are_documented() -> None:
    """Each key says what it means."""
    assert all(key.meaning and key.expected for key in KEYS.values())


@pytest.mark.parametrize(
    ("config", "cue", "status"),
    [
        ({}, lambda engine: engine.fail("x", ValueError("poison")), 500),
        ({}, lambda engine: engine.crash(RuntimeError("gone")), 503),
        ({"LMBRIDGE_TIMEOUT": 0.1}, lambda engine: None, 504),
    ],
)
def test_errors_have_their_status_in_plain_views(config: dict[str, Any], cue: Any, status: int) -> None:
    """A view needs no try: what ends its request has a status, a text and a class."""
    app = create_app(**config)
    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(app.test_client().post, "/ask", json={"prompt": "x"})
        engine.wait_for(lambda engine: bool(engine.started))
        cue(engine)
        if status == 500:
            engine.step()
        answer = asked.result(10)
    assert answer.status_code == status
    assert answer.get_json()["type"].endswith("Error")
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert (answer.headers.get("x-should-retry") == "false") == (status == 504)


def test_a_fault_that_passes_is_503(app: Flask) -> None:
    """A request that the engine lost may be sent again, and the status has clients do so."""
    error = EngineError("The engine has forgotten the request.")
    error.retryable = True
    with scripted_engine(app) as engine:
        engine.refuse("x", error)
        answer = app.test_client().post("/ask", json={"prompt": "x"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")


def test_bad_input_and_a_full_queue_have_theirs() -> None:
    """400 for the caller's mistake; 429 with Retry-After when there is no room."""
    app = create_app(LMBRIDGE_MAX_PENDING=1, LMBRIDGE_MAX_PENDING_PER_CLIENT=1)
    post = app.test_client().post
    with scripted_engine(app, manual=True, max_batch_size=1) as engine:
        assert post("/ask", json={"prompt": ""}).status_code == 400
        running = post("/begin", json={"prompt": "a"})
        engine.wait_for(lambda engine: engine.active == 1)
        waiting = post("/begin", json={"prompt": "b"})
        full = post("/ask", json={"prompt": "c"})
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert "Try again later." in full.text
        assert "when_full" not in full.text  # a hint for the program; whoever asked cannot follow it
        engine.step()
        engine.wait_for(lambda engine: len(engine.started) == 2)
        engine.step()
        assert (running.text, waiting.text) == ("begun: a", "begun: b")


@pytest.mark.parametrize("route", ["/ask", "/tell"])
@pytest.mark.parametrize(
    ("sent", "status", "told"),
    [
        ({"json": {}}, 400, "The prompt is empty"),
        ({"json": {"prompt": None}}, 400, "A prompt is a string"),
        ({"json": {"prompt": 3}}, 400, "A prompt is a string"),
        ({"json": {"prompt": {"text": "x"}}}, 400, "A prompt is a string"),
        ({"data": "{", "content_type": "application/json"}, 400, "Bad Request"),
        ({"data": {"prompt": "x"}}, 415, "Unsupported Media Type"),
    ],
)
def test_a_body_without_a_prompt(app: Flask, route: str, sent: dict[str, Any], status: int, told: str) -> None:
    """A visitor who sends something else is told so, rather than that the server failed."""
    with scripted_engine(app):
        answer = app.test_client().post(route, **sent)
    assert (answer.status_code, told in answer.text) == (status, True)


def test_a_stream_that_fails_early_has_a_status(app: Flask) -> None:
    """Before the first token the response can still be an error; after it, the last event says so."""
    with scripted_engine(app, manual=True) as engine:
        engine.refuse("early", InvalidRequestError("too long"))
        assert app.test_client().post("/tell", json={"prompt": "early"}).status_code == 400
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(app.test_client().post, "/tell", json={"prompt": "late one"})
            engine.wait_for(lambda engine: engine.active == 1)
            engine.step()
            late = asked.result(10)  # its headers are out
            engine.fail("late one", ValueError("poison"))
            engine.step()
            assert [late.status_code, events(late)[-1]["type"]] == [200, "EngineError"]


def test_a_stream_that_somebody_closes_says_so(app: Flask) -> None:
    """An app may close a stream while it is sent; events that merely end would look like a whole answer."""
    streams: Queue[Stream] = Queue()

    @app.get("/held")
    def held() -> Response:
        stream = current_bridge.stream("one two three")
        streams.put(stream)
        return lm.stream_response(stream)

    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: events(app.test_client().get("/held")))
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        streams.get(timeout=10).close()
        assert answer.result(10)[-1]["type"] == "RequestAbortedError"


def test_a_stream_of_another_bridge(app: Flask) -> None:
    """What a view reads from a bridge of its own making ends with the response too."""
    with Bridge(ScriptedEngine(manual=True)) as bridge, app.test_request_context():
        stream = bridge.stream("one two")
        with lm.stream_response(stream) as response:
            assert next(response.iter_encoded()) == b": open\n\n"
        assert stream.response.finish_reason == "abort"


def test_accounts_share_the_queue_fairly() -> None:
    """One tenant's crowd of requests must not make another's single one wait for all of them."""
    app = Flask("tenants")
    app.config["LMBRIDGE_MODEL"] = "demo"
    fair = LMBridge(app, account=lambda request: request.headers["X-Tenant"])

    @app.post("/ask")
    def ask() -> Response:
        stream = fair.bridge().stream(request.get_data(as_text=True))
        return Response(itertools.chain(["asked"], (delta.text for delta in stream)))

    def post(tenant: str, text: str) -> Any:
        return app.test_client().post("/ask", data=text, headers={"X-Tenant": tenant})

    order: list[str] = []

    def script(request: Any) -> list[str]:
        order.append(prompt_text(request.prompt))
        return ["done"]

    with scripted_engine(app, manual=True, max_batch_size=1, script=script) as engine:
        answers = [post("crowd", f"crowd {n}") for n in range(8)]
        engine.wait_for(lambda engine: engine.active == 1)
        answers.append(post("single", "single"))
        for done in range(9):
            engine.wait_for(lambda engine, done=done: len(engine.started) > done)  # type: ignore[misc]
            engine.step()
        assert [answer.text for answer in answers] == ["askeddone"] * 9
    assert order.index("single") <= 2


def test_what_a_view_leaves_running_is_aborted(app: Flask) -> None:
    """A view that fails in the middle, or forgets a future, must not keep the engine busy."""

    @app.get("/forgetful")
    def forgetful() -> str:
        current_bridge.submit("left behind")
        next(iter(current_bridge.stream("left open")))
        raise KeyError("a bug")

    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(app.test_client().get, "/forgetful")
        engine.wait_for(lambda engine: engine.active == 2)
        engine.step()
        assert answer.result(10).status_code == 500
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 2


def test_signals_tell_of_answers_and_failures(app: Flask) -> None:
    """Accounting and alerts listen here, rather than wrap every view."""
    told: list[Any] = []

    def on_answer(sender: Flask, model: str, response: Any) -> None:
        told.append((sender.name, model, response.text))

    def on_failure(sender: Flask, model: str, error: Exception) -> None:
        told.append((sender.name, model, type(error).__name__))

    with scripted_engine(app) as engine, answered.connected_to(on_answer, app), failed.connected_to(on_failure, app):
        engine.fail("bad", ValueError())
        for route, prompt in (("/ask", "one"), ("/tell", "two"), ("/ask", "bad")):
            with app.test_client().post(route, json={"prompt": prompt}) as answer:
                answer.get_data()
    assert told == [(app.name, "demo", "one"), (app.name, "demo", "two"), (app.name, "demo", "EngineError")]


@pytest.mark.parametrize("error", [ValueError("as told"), SystemExit("as told")])
def test_a_listener_that_fails(app: Flask, caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """A fault in somebody's accounting costs no visitor an answer, and the log has it."""

    def on_answer(sender: Flask, model: str, response: Any) -> None:
        raise error

    with scripted_engine(app), answered.connected_to(on_answer, app):
        for route in ("/ask", "/tell"):
            answer = app.test_client().post(route, json={"prompt": "one"})
            assert (answer.status_code, "one" in answer.text) == (200, True)
    assert caplog.text.count("as told") >= 2


def test_outside_of_requests(app: Flask) -> None:
    """A shell or a command of the app's own has the same bridge."""
    with scripted_engine(app), app.app_context():
        assert current_bridge.infer("from a shell").text == "from a shell"


def test_an_app_that_closes_takes_no_more(app: Flask) -> None:
    """503 tells a load balancer to go elsewhere."""
    models_of(app).close()
    answer = app.test_client().post("/ask", json={"prompt": "x"})
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers


def test_the_status_command(app: Flask) -> None:
    """``flask lmbridge status`` shows what is served; ``--load`` proves that it works."""
    from lmbridge.flask.command import group

    app.cli.add_command(group)
    shown = app.test_cli_runner().invoke(args=["lmbridge", "status", "--load"])
    assert shown.exit_code == 0, shown.output
    assert "demo (default)" in shown.output
    assert "answered" in shown.output


def test_the_status_command_tries_each_kind() -> None:
    """``--load`` has each model do what it does: an encoder is not asked for text."""
    from lmbridge.flask.command import group

    app = Flask("kinds")
    engines = {"embeds": ScriptedEncoder(tasks=["embed"]), "ranks": ScriptedEncoder(tasks=["rerank"])}
    with Bridge(engines["embeds"]) as embeds, Bridge(engines["ranks"]) as ranks:
        app.config["LMBRIDGE_MODELS"] = {"embeds": embeds, "ranks": ranks}
        LMBridge(app)
        app.cli.add_command(group)
        shown = app.test_cli_runner().invoke(args=["lmbridge", "status", "--load"])
    assert shown.exit_code == 0, shown.output
    assert "returned a vector of 8 dimensions" in shown.output
    assert "returned the score 1" in shown.output


def test_the_status_command_without_the_extension() -> None:
    """One line rather than a traceback."""
    from lmbridge.flask.command import group

    bare = Flask("bare")
    bare.cli.add_command(group)
    shown = bare.test_cli_runner().invoke(args=["lmbridge", "status"])
    assert shown.exit_code == 1
    assert "did you forget" in shown.output


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("org/a-model", "org/a-model"),
        ("./folder/of-a-model", "of-a-model"),
        ("http://key:secret@host:8000/v1", "host:8000"),
        ("https://one.example/v1,https://two.example/v1", "one.example"),
    ],
)
def test_what_clients_call_a_model(model: str, name: str) -> None:
    """Without a name of its own a model is called so that a client can tell it from others, and no secret is told."""
    assert served_name(model) == name
