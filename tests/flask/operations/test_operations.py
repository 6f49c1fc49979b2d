"""Probes, metrics, status and the exchange of a model, as whoever operates an app sees them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings, strategies
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

from lmbridge import Bridge, EngineStartError
from lmbridge.engines import ENGINES
from lmbridge.engines.transformers import TransformersEngine
from lmbridge.flask import LMBridge, operations
from lmbridge.flask.models import models_of
from lmbridge.flask.serving import AccessLog, create_app
from lmbridge.flask.swap import Order, exchange
from lmbridge.prometheus import ENGINE_COUNTERS, ENGINE_GAUGES
from lmbridge.testing import ScriptedEngine

PATIENCE = 30.0
HTTP_PAGE = Path(__file__).parents[3] / "docs" / "http" / "operations.rst"
gates: dict[str, threading.Event] = {}  # by model: an engine waits for its own while it loads


class NamedEngine(ScriptedEngine):
    """Answers everything with its model's name; "broken" cannot be loaded."""

    def __init__(self, model: str) -> None:
        error = RuntimeError("no such weights") if model == "broken" else None
        super().__init__(lambda request: [model], start_error=error, start_gate=gates.get(model))


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the engine "named"."""
    monkeypatch.setitem(ENGINES, "named", (__name__, "NamedEngine"))
    gates.clear()


def build(**config: Any) -> Flask:
    app = Flask(__name__)
    config.setdefault("LMBRIDGE_MODELS", {"first": {"model": "one", "engine": "named"}})
    app.config.update(config)
    LMBridge(app)
    app.register_blueprint(operations.blueprint)
    return app


@pytest.fixture
def app() -> Iterator[Flask]:
    """One model, "first", whose answers are "one"; and an admin key."""
    app = build(LMBRIDGE_ADMIN_KEY="root")
    yield app
    models_of(app).close()


def bridge_of(app: Flask, name: str = "first") -> Bridge:
    return models_of(app).bridge(name)


def told(answer: TestResponse) -> dict[str, Any]:
    """The JSON object in a response."""
    found = answer.get_json()
    assert isinstance(found, dict)
    return found


# --- probes ---


def test_health_is_about_what_a_restart_would_mend(app: Flask) -> None:
    """A model that nobody asked for yet is no fault; one that is down for good is."""
    client = app.test_client()
    assert client.get("/health").status_code == 200
    broken = build(LMBRIDGE_MODELS={"first": {"model": "broken", "engine": "named"}})
    broken.test_client().get("/ready")
    with pytest.raises(EngineStartError):
        bridge_of(broken).start(PATIENCE)
    answer = broken.test_client().get("/health")
    assert answer.status_code == 503
    assert "no such weights" in told(answer)["faults"]["first"]
    models_of(broken).close()


def test_health_when_the_server_thread_is_stuck(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server thread that shows no sign of life is a fault, though its state says that all is well."""
    engine, release = ScriptedEngine(), threading.Event()
    with Bridge(engine, stall_timeout=None) as bridge:
        models_of(app).replace("first", bridge)
        engine.block(release)
        client = app.test_client()
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(operations, "LOOP_PATIENCE", 0.0)
        answer = client.get("/health")
        assert (answer.status_code, told(answer)["models"]["first"]["state"]) == (503, "ready")
        assert "stuck" in told(answer)["faults"]["first"]
        release.set()


def test_ready_loads_and_tells(app: Flask) -> None:
    """Asking begins to load; 503 with the state until the model serves, and again once the end has begun."""
    gate = gates["one"] = threading.Event()
    client = app.test_client()
    assert bridge_of(app).state == "new"
    answer = client.get("/ready")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert told(answer)["models"] == {"first": {"state": "starting", "reason": "", "engine": "one"}}
    gate.set()
    bridge_of(app).start(PATIENCE)
    assert told(client.get("/ready")) == {
        "ready": True, "draining": False, "models": {"first": {"state": "ready", "reason": "", "engine": "scripted"}},
    }  # fmt: skip
    models_of(app).close()
    answer = client.get("/ready")
    assert (answer.status_code, told(answer)["draining"]) == (503, True)


def test_ready_waits_for_every_model() -> None:
    """An app with two models is ready when both are."""
    gate = gates["two"] = threading.Event()
    sources = {"first": {"model": "one", "engine": "named"}, "second": {"model": "two", "engine": "named"}}
    app = build(LMBRIDGE_MODELS=sources)
    client = app.test_client()
    client.get("/ready")
    bridge_of(app).start(PATIENCE)
    assert client.get("/ready").status_code == 503
    gate.set()
    bridge_of(app, "second").start(PATIENCE)
    assert client.get("/ready").status_code == 200
    models_of(app).close()


# --- numbers ---


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics() -> None:
    """Every model's metrics under its label, each family once, beside the process's own."""
    sources = {"first": {"model": "one", "engine": "named"}, "second": {"model": "two", "engine": "named"}}
    app = build(LMBRIDGE_MODELS=sources)
    client = app.test_client()
    bridge_of(app).infer(["a", "b"])
    bridge_of(app, "second").infer("c")
    models_of(app).disconnects = 3
    answer = client.get("/metrics")
    assert answer.content_type.startswith("text/plain")
    found = samples(answer.text)
    assert found["lmbridge_requests_total model=first outcome=stop"] == 2
    assert found["lmbridge_requests_total model=second outcome=stop"] == 1
    assert found["lmbridge_engine_max_batch_size model=second"] == 64
    assert found["lmbridge_http_disconnects_total"] == 3
    assert found["process_resident_memory_bytes"] > 1e6
    families = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    models_of(app).close()


def test_metrics_in_the_newer_format(app: Flask) -> None:
    """A scraper that asks for OpenMetrics gets it."""
    answer = app.test_client().get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.content_type.startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_the_table_of_metrics_has_what_is_exported() -> None:
    """Who writes an alert looks a name up in docs/http/operations.rst, and finds all there are with their kinds."""
    app = create_app({"LMBRIDGE_MODEL": "demo"})
    bridge_of(app, "demo").infer("Hello", max_new_tokens=2)
    text = app.test_client().get("/metrics").text
    models_of(app).close()
    exported = dict(re.findall(r"^# TYPE (lmbridge_\w+) (\w+)$", text, re.MULTILINE))
    exported |= {f"lmbridge_engine_{name}_total": "counter" for name in ENGINE_COUNTERS}
    exported |= {f"lmbridge_engine_{name}": "gauge" for name in ENGINE_GAUGES}
    rows = re.findall(r"^(``lmbridge_.*``) +(counter|gauge|histogram) ", HTTP_PAGE.read_text(), re.MULTILINE)
    assert {name: kind for names, kind in rows for name in re.findall(r"lmbridge_\w+", names)} == exported


def test_status(app: Flask) -> None:
    """The page's numbers, which agree with what the bridge has answered; nothing is loaded by looking."""
    client = app.test_client()
    before = told(client.get("/status"))
    assert (before["models"]["first"]["state"], before["models"]["first"]["engine"]) == ("new", {})
    bridge_of(app).infer(["a", "b", "c"])
    now = told(client.get("/status"))
    first = now["models"]["first"]
    assert (now["default"], now["draining"], now["disconnects"]) == ("first", False, 0)
    assert (first["requests"], first["completion_tokens"], first["engine"]["tokens"]) == ({"stop": 3}, 3, 3)
    assert (first["first_token"]["count"], first["waiting"], first["running"]) == (3, 0, 0)
    assert 1 <= first["mean_batch_size"] <= 3
    assert now["uptime"] >= before["uptime"] >= 0


# --- the exchange of a model ---


def ask(client: FlaskClient, body: Any, key: str = "root") -> TestResponse:
    return client.post("/admin/swap", json=body, headers={"Authorization": f"Bearer {key}"})


def news(answer: TestResponse) -> list[dict[str, Any]]:
    assert answer.content_type == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_swap(app: Flask) -> None:
    """The model changes under its name, on the engine that it had, with news meanwhile; no request fails."""
    bridge, client = bridge_of(app), app.test_client()
    bridge.start()
    gate = gates["two"] = threading.Event()
    answer = ask(client, {"model": "first", "to": "two"})
    lines = answer.iter_encoded()
    first = json.loads(next(lines))
    assert (first["outcome"], first["model"], first["to"], first["state"]) == ("pending", "first", "two", "ready")
    assert bridge.infer("while it loads").text == "one"
    gate.set()
    last = json.loads(list(lines)[-1])
    assert last["outcome"] == "done"
    assert bridge.infer("after").text == "two"
    answer.close()


def test_a_swap_that_fails_keeps_the_old_model(app: Flask) -> None:
    """A model that cannot be loaded is told by the last line, and the old one goes on."""
    bridge, client = bridge_of(app), app.test_client()
    bridge.start()
    gate = gates["broken"] = threading.Event()
    answer = ask(client, {"to": "broken", "engine": "named"})
    lines = answer.iter_encoded()
    assert json.loads(next(lines))["outcome"] == "pending"
    gate.set()
    last = json.loads(list(lines)[-1])
    assert (last["outcome"], last["error"]["type"], last["error"]["status"]) == ("failed", "EngineStartError", 503)
    assert "no such weights" in last["error"]["message"]
    assert bridge.infer("still").text == "one"
    answer.close()


def test_one_swap_at_a_time(app: Flask) -> None:
    """A second order for the same model is refused while the first is under way, and taken after it."""
    bridge_of(app).start()
    gate = gates["two"] = threading.Event()
    client, order = app.test_client(), {"to": "two", "engine": "named"}
    answer = ask(client, order)
    assert ask(client, order).status_code == 409
    gate.set()
    assert news(answer)[-1]["outcome"] == "done"
    assert news(ask(client, {"to": "three", "engine": "named"}))[-1]["outcome"] == "done"


def test_a_swap_goes_on_without_its_client(app: Flask) -> None:
    """Whoever asked may leave; the new model comes all the same."""
    bridge = bridge_of(app)
    bridge.start()
    gate = gates["two"] = threading.Event()
    answer = ask(app.test_client(), {"to": "two", "engine": "named"})
    next(answer.iter_encoded())
    answer.close()
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "lmbridge swap":
            thread.join(PATIENCE)
    assert bridge.infer("who?").text == "two"


def test_a_swap_that_cannot_begin(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine out of threads fails one order, and not every later one with "is already being swapped"."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bridge, order = bridge_of(app), Order("first", "two", "named")
    bridge.start()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="thread"):
            exchange(bridge, order)
    assert json.loads(list(exchange(bridge, order))[-1])["outcome"] == "done"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ([], 400, "object"),
        ('"to"', 400, "object"),
        ("", 400, "JSON"),
        ({}, 400, "to"),
        ({"to": ""}, 400, "to"),
        ({"to": 3}, 400, "to"),
        ({"to": "two", "engine": 1}, 400, "engine"),
        ({"to": "two", "engine": "no-such-engine"}, 400, "no-such-engine"),
        ({"to": "two", "engine": "named", "options": []}, 400, "options"),
        ({"to": "two", "engine": "named", "options": {"no_such": 1}}, 400, "no_such"),
        ({"to": "two", "engine": "named", "options": {"overlap": False}}, 400, "overlap"),
        ({"to": "two", "engine": "named", "overlap": "yes"}, 400, "overlap"),
        ({"to": "two", "engine": "named", "timeout": True}, 400, "timeout"),
        ({"to": "two", "engine": "named", "timeout": -1}, 400, "timeout"),
        ({"to": "two", "engine": "named", "timeout": 10**400}, 400, "timeout"),
        ({"to": "two", "engine": "named", "timeout": float("nan")}, 400, "NaN"),
        ({"to": "two", "engine": "named", "timeout": -math.inf}, 400, "Infinity"),
        ('{"to": "two", "engine": "named", "timeout": 1e999}', 400, "timeout"),
        ('{"to": "two", "engine": "named", "timeout": ' + "9" * 5000 + "}", 400, "JSON"),
        ('{"to": ' + "[" * 100_000, 400, "nests too deeply"),
        (b'{"to": "\xff"}', 400, "UTF-8"),
        (b'{"to": "\\ud800"}', 400, "surrogate"),
        *(
            ({"to": "two", "engine": "named", "options": {name: 1}}, 400, name)
            for name in ("self", "engine_options", "args", "kwargs", "cls", "name", "start_gate", "__class__", "device")
        ),
        ({"to": "two", "engine": "named", "model": "second"}, 404, "second"),
        ({"to": "two", "what": 1}, 400, "what"),
        ({"to": "./no-such-folder", "engine": "transformers"}, 404, "no-such-folder"),
    ],
)
def test_wrong_orders(app: Flask, body: Any, status: int, word: str) -> None:
    """What is wrong with an order is told by the status, by name, and nothing is exchanged."""
    bridge_of(app).start()
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    answer = app.test_client().post("/admin/swap", data=data, headers={"Authorization": "Bearer root"})
    assert answer.status_code == status
    assert word in told(answer)["error"]
    assert bridge_of(app).infer("still").text == "one"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=6,
)
OPTIONS = [*inspect.signature(Bridge.swap).parameters, *inspect.signature(TransformersEngine).parameters]
ORDERS = strategies.fixed_dictionaries(
    {"engine": strategies.just("named") | JSON.filter(lambda value: value not in ("transformers", None))},
    optional={
        **dict.fromkeys(("model", "to", "overlap", "timeout", "else"), JSON),
        "options": JSON | strategies.dictionaries(strategies.sampled_from(OPTIONS), JSON),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=strategies.binary(max_size=60) | (JSON.filter(lambda value: not isinstance(value, dict)) | ORDERS))
def test_no_order_is_a_server_error(app: Flask, body: Any) -> None:
    """Whatever an operator's script sends, it is told what is wrong, and the model goes on serving."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Authorization": "Bearer root"}
    with app.test_client().post("/admin/swap", data=data, headers=headers) as answer:
        assert answer.status_code < 500, answer.get_data()
        assert answer.status_code == 200 or "error" in answer.get_json()
        answer.get_data()
    assert bridge_of(app).infer("still", timeout=PATIENCE).finish_reason == "stop"


def test_swap_needs_the_admin_key(app: Flask) -> None:
    """Without a key on the server there is no such route; with one, nobody else may use it."""
    client = build().test_client()
    assert ask(client, {"to": "two"}).status_code == 404
    client = app.test_client()
    assert client.post("/admin/swap", json={"to": "two"}).status_code == 401
    for key in ("", "roo", "root2", "rööt"):
        assert ask(client, {"to": "two"}, key).status_code == 401
    assert client.post("/admin/swap", json={"to": "two"}, headers={"Authorization": "Basic root"}).status_code == 401


REMOTE = [("trust_remote_code", True), ("trust_remote_code", "yes"), ("attn_implementation", "someone/kernel:run")]


@pytest.mark.parametrize(("option", "value"), [*REMOTE, ("attn_implementation", "flash_attention_2")])
def test_an_admin_key_loads_no_code(app: Flask, option: str, value: Any) -> None:
    """Whoever has the key exchanges models and does not become the server's user, unless the server was told so."""
    order = {"to": "./no-such-folder", "options": {option: value}}
    for engine in ("transformers", "encoder", "lmdeploy"):
        answer = ask(app.test_client(), {**order, "engine": engine})
        assert (answer.status_code, "--allow-remote-code" in told(answer)["error"]) == (403, True)
    open_app = build(LMBRIDGE_ADMIN_KEY="root", LMBRIDGE_ALLOW_REMOTE_CODE=True)
    assert ask(open_app.test_client(), {**order, "engine": "transformers"}).status_code == 404
    models_of(open_app).close()


def test_harmless_options_need_no_leave(app: Flask) -> None:
    """What says no to code, or names an attention that transformers brings, is an option like any other."""
    for options in ({"trust_remote_code": False}, {"attn_implementation": "eager"}, {"attn_implementation": None}):
        order = {"to": "./no-such-folder", "engine": "transformers", "options": options}
        assert ask(app.test_client(), order).status_code == 404


def test_an_order_is_read_no_further_than_any_body(app: Flask) -> None:
    """An order without end must not fill the memory."""
    app.extensions["lmbridge"].settings = dataclasses.replace(models_of(app).settings, max_request_bytes=1000)
    assert ask(app.test_client(), {"to": "x" * 1000}).status_code == 413


def test_the_access_log_has_a_line_an_answer(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a method nor an address that a proxy passes on, nor a path, can end a line of the log or colour it."""
    app.wsgi_app = AccessLog(app.wsgi_app)  # type: ignore[method-assign]
    with caplog.at_level("INFO", "lmbridge.access"):
        forged = {"REMOTE_ADDR": "::1\nforged", "REQUEST_METHOD": "\x1b[31m"}
        app.test_client().get("/he%0Aalth", environ_overrides=forged).close()
    assert re.fullmatch(r"::1%0Aforged %1B%5B31m /he%0Aalth 40\d \d\.\d{3} s", caplog.messages[0])
