"""Two bridges in a row: Flask's threads, a bridge, HTTP, and the bridge of ``lmbridge serve`` in its own process."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, cast

import pytest
from flask import Flask, request
from openai import OpenAI

from lmbridge import Delta
from lmbridge.flask import LMBridge
from lmbridge.flask.serving import create_app
from lmbridge.messages import Request, ToolCall
from lmbridge.testing import ScriptedEngine
from tests.cli.conftest import LMBRIDGE
from tests.cli.test_serve import Served, serving
from tests.conftest import until
from tests.engines.openai.conftest import PATIENCE, Far, far_end
from tests.flask.conftest import on_serve


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """``lmbridge serve demo``."""
    with serving("demo", "--no-page", command=LMBRIDGE) as served:
        served.wait_until("/ready", 200)
        yield served


@pytest.fixture
def near(demo: Served) -> Iterator[str]:
    """A Flask app of a user's, whose model is there."""
    app = Flask(__name__)
    app.config["LMBRIDGE_MODEL"] = f"{demo.url}/v1"
    lm = LMBridge(app)

    @app.post("/ask")
    def ask() -> Any:
        return lm.bridge().infer(request.get_data(as_text=True), max_new_tokens=12).text

    @app.post("/tell")
    def tell() -> Any:
        told = lm.bridge().stream(request.get_data(as_text=True), max_new_tokens=4000, ignore_eos=True)
        return lm.stream_response(told)

    with on_serve(app) as url:
        yield url
    app.extensions["lmbridge"].close(timeout=0.0)


def post(url: str, path: str, text: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", path, text.encode())
    return connection, connection.getresponse()


def far_running(demo: Served) -> float:
    """Requests inside the far end's engine."""
    return float(demo.model()["engine"]["in_flight"])


@pytest.mark.long
def test_twenty_flask_threads_share_a_remote_model(demo: Served, near: str) -> None:
    """Each view gets the answer to its own question, the one that the far end gives to it alone."""
    prompts = [f"Tell me about the number {number}." for number in range(20)]

    def ask(prompt: str) -> str:
        connection, response = post(near, "/ask", prompt)
        with closing(connection):
            assert response.status == 200
            return response.read().decode()

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, prompts))
    alone = [demo.chat(prompt, max_tokens=12, temperature=0).json["choices"][0]["message"] for prompt in prompts]
    assert together == [message["content"] for message in alone]


@pytest.mark.long
def test_whoever_leaves_the_near_end_frees_the_far_one(demo: Served, near: str) -> None:
    """Browser tabs are closed: the far end's engine stops within a second, through both bridges."""
    told = [post(near, "/tell", f"Tell me story {number}.") for number in range(4)]
    assert all(response.readline() for _, response in told)
    until(lambda: far_running(demo) == 4)
    for connection, response in told:
        response.close()
        connection.close()
    until(lambda: far_running(demo) == 0, 1.0)
    until(lambda: demo.model()["requests"].get("DisconnectedError") == 4)


@contextmanager
def gateway(far: Far) -> Iterator[str]:
    """``lmbridge serve`` before the far end."""
    app = create_app({"LMBRIDGE_MODELS": {"far": far.url}}, page=False)
    with on_serve(app) as url:
        yield url
    app.extensions["lmbridge"].close(timeout=0.0)


class Spelled(ScriptedEngine):
    """It can tell its tokens' texts."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [{1: "The", 2: " end", 3: "A", 4: "\N{REPLACEMENT CHARACTER}"}.get(token, "") for token in token_ids]


def test_texts_of_tokens_come_through_both() -> None:
    """Log-probabilities through a gateway are read as if the model were there: by texts and bytes, not by ids."""
    said = [Delta("The", logprobs=[{1: -0.5, 3: -1.5}]), Delta(" end", logprobs=[{2: -0.25, 9: -3.0}])]
    with far_end(Spelled(lambda request: said)) as far, gateway(far) as url:
        for at in (far.url, f"{url}/v1"):
            client = OpenAI(base_url=at, api_key="none", max_retries=0, timeout=PATIENCE)
            raw = client.completions.create(model="far", prompt="hello", logprobs=2).choices[0].logprobs
            assert raw is not None
            assert raw.tokens == ["The", " end"]
            assert raw.top_logprobs == [{"The": -0.5, "A": -1.5}, {" end": -0.25, "token_id:9": -3.0}]
            messages: Any = [{"role": "user", "content": "hello"}]
            told = client.chat.completions.create(model="far", messages=messages, logprobs=True, top_logprobs=2)
            assert told.choices[0].logprobs is not None
            places = told.choices[0].logprobs.content or []
            assert [(place.token, bytes(place.bytes or [])) for place in places] == [("The", b"The"), (" end", b" end")]
            assert [(top.token, top.bytes) for top in places[1].top_logprobs] == [
                (" end", list(b" end")),
                ("token_id:9", None),
            ]
            client.close()


def test_a_server_before_servers() -> None:
    """``lmbridge serve http://…`` is a gateway: OpenAI's client reads texts, thoughts and calls through both."""
    asked: list[Request] = []

    def script(request: Request) -> list[str | Delta]:
        asked.append(request)
        return [Delta(reasoning="Hm."), "I look.", Delta(tool_calls=[ToolCall(0, "c", "look", '{"at": 1}')])]

    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with far_end(ScriptedEngine(script)) as far, gateway(far) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(model="far", messages=messages, tools=[tool], seed=3, stop=["x"])
        choice = whole.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert choice.message.model_extra == {"reasoning_content": "Hm."}
        (call,) = cast(Any, choice.message.tool_calls)
        assert (call.function.name, call.function.arguments) == ("look", '{"at": 1}')
        assert (asked[0].config.random_seed, asked[0].config.stop_words) == (3, ["x"])
        client.close()
