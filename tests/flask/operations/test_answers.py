"""What /metrics counts of HTTP itself, over real servers."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from flask import Flask
from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import EnvironBuilder

from lmbridge import Bridge
from lmbridge.flask.answers import current_answers
from lmbridge.flask.serving import create_app
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.flask.conftest import Serve

PATIENCE = 30.0
CHAT = "/v1/chat/completions"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def app() -> Iterator[Flask]:
    """All that ``lmbridge serve`` serves, and a view that fails."""
    with Bridge(ScriptedEngine(lambda request: ["one ", "two "])) as bridge:
        app = create_app({"LMBRIDGE_MODELS": {"demo": bridge}, "LMBRIDGE_ALLOWED_HOSTS": ["localhost"]})
        app.add_url_rule("/fails/<int:number>", view_func=fail)
        yield app


def fail(number: int) -> str:
    raise RuntimeError("a fault of the app's own")


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def counted(url: str) -> dict[tuple[str, str], float]:
    """Answers by route and status, ``/metrics`` itself left out; and by route and "seconds" how many were measured."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as response:
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    kinds = {"lmbridge_http_answers_total": "", "lmbridge_http_seconds_count": "seconds"}
    return {
        (sample.labels["route"], sample.labels.get("status", kinds[sample.name])): sample.value
        for sample in samples
        if sample.name in kinds and sample.labels["route"] != "/metrics"
    }


def collected(app: Flask) -> float:
    """How many chats the app has answered."""
    with app.app_context():
        counter, _ = current_answers().collect()
    return sum(float(sample.value) for sample in counter.samples if sample.labels["route"] == CHAT)


def test_answers_are_counted_by_route_and_status(app: Flask, serve: Serve) -> None:
    """What was refused, not found, or failed is seen by whoever watches, and no path of a client's becomes a label."""
    with serve(app) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(2):
            client.chat.completions.create(model="demo", messages=QUESTION)
        assert list(client.chat.completions.create(model="demo", messages=QUESTION, stream=True))
        with pytest.raises(NotFoundError):
            client.chat.completions.create(model="none", messages=QUESTION)
        for number in range(3):
            assert status(f"{url}/no/such/route/{number}") == 404
            assert status(f"{url}/fails/{number}") == 500
        assert status(f"{url}/health", Host="evil.example") == 421
        expected = {
            (CHAT, "200"): 3, (CHAT, "404"): 1, (CHAT, "seconds"): 4, ("none", "404"): 3, ("none", "seconds"): 3,
            ("/fails/<int:number>", "500"): 3, ("/fails/<int:number>", "seconds"): 3, ("/health", "421"): 1,
            ("/health", "seconds"): 1,
        }  # fmt: skip
        until(lambda: counted(url) == expected, PATIENCE)  # an answer is counted once its last byte is on its way


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_server_never_closes_is_counted(app: Flask, stream: bool) -> None:
    """Werkzeug's server leaves an answer open whose client resets the connection once it has all of it."""
    body = {"model": "demo", "messages": QUESTION, "stream": stream}
    environ = EnvironBuilder(path=CHAT, method="POST", json=body).get_environ()
    parts = app.wsgi_app(environ, lambda *_: lambda data: None)
    assert len(b"".join(parts)) > 0
    del parts
    assert collected(app) == 1


def test_a_stream_is_counted_at_its_end(serve: Serve) -> None:
    """The histogram tells how long users waited for all of an answer, and a lost client's answer is not forgotten."""
    engine = ScriptedEngine(lambda request: ["one ", "two "], manual=True)
    with Bridge(engine) as bridge:
        app = create_app({"LMBRIDGE_MODELS": {"demo": bridge}})
        with serve(app) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            read = client.chat.completions.create(model="demo", messages=QUESTION, stream=True)
            engine.wait_for(lambda engine: engine.active == 1)
            assert counted(url) == {}
            engine.step(2)
            list(read)
            until(lambda: counted(url) == {(CHAT, "200"): 1, (CHAT, "seconds"): 1}, PATIENCE)
            left = client.chat.completions.create(model="demo", messages=QUESTION, stream=True)
            engine.wait_for(lambda engine: engine.active == 1)
            left.close()
            until(lambda: counted(url) == {(CHAT, "200"): 2, (CHAT, "seconds"): 2}, PATIENCE)
