"""What clients see when things go wrong: crowded, late, broken, or when they leave themselves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests
from openai.types.chat import ChatCompletionMessageParam

from lmbridge import EngineDeadError, EngineError, Request
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, Served

Serve = Callable[..., Served]


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": say(text), **fields}


def endless(request: Request) -> list[str]:
    return ["word "] * 1_000_000


def sent(response: requests.Response) -> str:
    return "\n".join(line.decode() for line in response.iter_lines(chunk_size=1))


# --- the server is busy, slow or down ---


def test_a_full_queue_is_429(served: Serve) -> None:
    """A full queue turns away at once and says when to come again, streaming or not."""
    engine = ScriptedEngine(endless, manual=True, max_batch_size=1)
    busy = served(engine, {"max_pending": 1, "when_full": "reject"})
    first = busy.bridge.stream("a")
    engine.wait_for(lambda engine: engine.active == 1)
    second = busy.bridge.stream("b")
    with busy.client() as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="scripted", messages=say("c"), stream=stream)
            assert float(caught.value.response.headers["Retry-After"]) > 0
    first.close()
    second.close()


def test_the_client_comes_again_after_429(served: Serve) -> None:
    """The official client waits for as long as it is told and asks once more, without its user noticing."""
    engine = ScriptedEngine(manual=True, max_batch_size=1)
    busy = served(engine, {"max_pending": 1, "when_full": "reject"})
    first = busy.bridge.stream("a")
    engine.wait_for(lambda engine: engine.active == 1)
    second = busy.bridge.stream("b")
    refused = threading.Event()

    def make_room(response: Any) -> None:
        if response.status_code == 429:
            second.close()  # before the other, or it would begin in its place
            first.close()
            refused.set()

    with busy.client(max_retries=3) as client, ThreadPoolExecutor(1) as pool:
        client._client.event_hooks = {"response": [make_room]}
        answer = pool.submit(client.chat.completions.create, model="scripted", messages=say("hello"))
        assert refused.wait(PATIENCE)
        engine.wait_for(lambda engine: len(engine.started) > 1 and engine.active == 1, PATIENCE)
        engine.step()
        assert answer.result(PATIENCE).choices[0].message.content == "hello"


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_504_and_not_retried(served: Serve, stream: bool) -> None:
    """Who says how long to wait hears 504 when it is over; the client's retries would only wait again."""
    slow = served(ScriptedEngine(manual=True))
    with slow.client(max_retries=3) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="scripted", messages=say("x"), stream=stream, extra_body={"timeout": 0.1})
    assert caught.value.status_code == 504
    assert caught.value.response.headers["x-should-retry"] == "false"
    slow.engine.wait_for(lambda engine: engine.active == 0 and len(engine.started) <= 1)


def test_the_servers_deadline_bounds_the_clients(served: Serve) -> None:
    """LMBRIDGE_TIMEOUT holds for a client that allows more, and for one that allows any."""
    slow = served(ScriptedEngine(manual=True), timeout=0.1)
    for fields in ({}, {"timeout": 1000}):
        assert (
            requests.post(f"{slow.url}/chat/completions", json=body("x", **fields), timeout=PATIENCE).status_code == 504
        )


def test_a_client_that_waits_no_longer(served: Serve) -> None:
    """The client's own timeout ends the work here too."""
    slow = served(ScriptedEngine(manual=True))
    with slow.client(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="scripted", messages=say("x"))
    slow.engine.wait_for(lambda engine: len(engine.aborted) == 1, PATIENCE)


def test_an_engine_that_cannot_start_is_503(served: Serve) -> None:
    """A model that does not load is the server's fault, and the client may come again."""
    down = served(ScriptedEngine(start_error=RuntimeError("no such device")))
    with down.client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="scripted", messages=say("x"))
    assert caught.value.status_code == 503


class Simple(ScriptedEngine):
    """An engine that knows nothing but a limit."""

    supports = frozenset({"max_new_tokens"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_that_passes_is_503(served: Serve, stream: bool) -> None:
    """A request that the engine lost is sent again by the official client, and answered."""
    error = EngineError("The engine has forgotten the request.")
    error.retryable = True
    frail = served()
    frail.engine.refuse("x", error)
    post = requests.post(f"{frail.url}/chat/completions", json=body("x", stream=stream), timeout=PATIENCE)
    assert (post.status_code, post.headers["Retry-After"]) == (503, "5")


@pytest.fixture
def asked() -> Iterator[threading.Event]:
    """Set when a body was read, and held against what the engine can do: the next step is to ask the bridge."""
    event, logger = threading.Event(), logging.getLogger("lmbridge.flask.openai.asking")

    def note(record: logging.LogRecord) -> bool:
        event.set()
        return True

    logger.addFilter(note)
    logger.setLevel(logging.INFO)
    yield event
    logger.removeFilter(note)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("stream", [False, True])
def test_engines_that_know_little(served: Serve, asked: threading.Event, stream: bool) -> None:
    """Nobody is refused for a default: while the engine loads, the client is to come again, and then it is served."""
    gate = threading.Event()
    plain = served(Simple(start_gate=gate), log_prompts=True)
    with plain.client() as client, ThreadPoolExecutor(1) as pool:
        create: Any = client.chat.completions.create
        fields = body("x", stream=stream)
        first = pool.submit(requests.post, f"{plain.url}/chat/completions", json=fields, timeout=PATIENCE)
        assert asked.wait(PATIENCE)
        gate.set()
        early = first.result(PATIENCE)
        assert early.status_code == 503 or "being loaded" in early.text
        assert create(model="scripted", messages=say("x")).choices[0].message.content == "x"
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="scripted", messages=say("x"), temperature=0.5, stream=stream)
        assert caught.value.param == "temperature"


def test_a_closed_bridge_is_503(served: Serve) -> None:
    """A server that is going down says so in the envelope."""
    gone = served()
    gone.bridge.close()
    response = requests.post(f"{gone.url}/chat/completions", json=body("x"), timeout=PATIENCE)
    assert response.status_code == 503
    assert response.json()["error"]["message"]


# --- who is who ---


def test_two_requests_of_one_id(served: Serve) -> None:
    """Clients that use one id for two requests at once get both answers."""
    both = served(ScriptedEngine(manual=True))
    with ThreadPoolExecutor(2) as pool:
        header = {"x-request-id": "same"}
        url = f"{both.url}/chat/completions"
        posts = [pool.submit(requests.post, url, json=body("x"), headers=header, timeout=PATIENCE) for _ in range(2)]
        both.engine.wait_for(lambda engine: engine.active == 2)
        both.engine.step()
        responses = [post.result(PATIENCE) for post in posts]
    assert [(found.status_code, found.headers["x-request-id"]) for found in responses] == [(200, "same")] * 2


def test_a_users_name_buys_no_turns(served: Serve) -> None:
    """``user`` is the client's free choice: requests under many names are one account's all the same."""
    fair = served(ScriptedEngine(manual=True))
    with ThreadPoolExecutor(2) as pool:
        url = f"{fair.url}/chat/completions"
        posts = [
            pool.submit(requests.post, url, json=body("x", user=name), timeout=PATIENCE) for name in ("ann", "bob")
        ]
        fair.engine.wait_for(lambda engine: engine.active == 2)
        accounts = {request.client for request in fair.bridge.requests()}
        fair.engine.step()
        assert [post.result(PATIENCE).status_code for post in posts] == [200, 200]
    assert len(accounts) == 1


# --- it breaks in the middle ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_answer(served: Serve, stream: bool) -> None:
    """An engine that fails one request at once fails it with a status, and goes on with the others."""
    frail = served()
    frail.engine.fail("poison", ValueError("bad luck"))
    with frail.client() as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="scripted", messages=say("poison"), stream=stream)
        assert client.chat.completions.create(model="scripted", messages=say("x")).choices[0].message.content == "x"


def test_a_failure_in_mid_stream_raises(served: Serve) -> None:
    """After the first token an error is an event: the official client raises, and nobody takes the part for a whole."""
    frail = served(ScriptedEngine(endless, manual=True))
    with frail.client() as client, ThreadPoolExecutor(1) as pool:
        create: Any = client.chat.completions.create
        opened = pool.submit(create, model="scripted", messages=say("x"), stream=True)
        frail.engine.wait_for(lambda engine: engine.active == 1)
        frail.engine.step()
        stream = iter(opened.result(PATIENCE))
        assert next(stream).choices[0].delta.content == "word "
        frail.engine.crash(RuntimeError("the device is gone"))
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.message


def test_a_failed_stream_has_no_final_word(served: Serve) -> None:
    """Clients that know no error events wait for [DONE], and do not get it."""
    frail = served(ScriptedEngine(endless, manual=True))
    with ThreadPoolExecutor(1) as pool:
        post = pool.submit(
            requests.post, f"{frail.url}/chat/completions", json=body("x", stream=True), stream=True, timeout=PATIENCE
        )
        frail.engine.wait_for(lambda engine: engine.active == 1)
        frail.engine.step()
        with post.result(PATIENCE) as response:
            frail.engine.crash(EngineDeadError("gone"))
            text = sent(response)
    assert '"word "' in text
    assert '{"error": {' in text
    assert "[DONE]" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_answers_fails(served: Serve, stream: bool) -> None:
    """A failure of one answer ends the request, and the others do not run on for nobody."""
    frail = served(ScriptedEngine(endless, manual=True))
    prompts: dict[str, Any] = {"model": "scripted", "prompt": ["good", "bad", "fine"], "max_tokens": 1000}
    with ThreadPoolExecutor(1) as pool:
        fields = {**prompts, "stream": stream}
        post = pool.submit(requests.post, f"{frail.url}/completions", json=fields, stream=stream, timeout=PATIENCE)
        frail.engine.wait_for(lambda engine: engine.active == 3)
        if stream:
            frail.engine.step()
            post.result(PATIENCE)
        frail.engine.fail("bad", ValueError("bad luck"))
        frail.engine.step()
        with post.result(PATIENCE) as response:
            assert response.status_code == (200 if stream else 500)
            assert '"code": "engine_error"' in sent(response)
    frail.engine.wait_for(lambda engine: engine.active == 0)
    assert len(frail.engine.aborted) == 2


# --- the client goes away ---


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_dropped_stream_is_aborted(served: Serve, route: str) -> None:
    """A client that drops the connection in mid-stream frees its place in the engine, whatever the engine says."""
    left = served(ScriptedEngine(endless, step_time=0.01))
    fields = {**body("x", stream=True), "prompt": "x", "max_tokens": 1_000_000}
    with requests.post(f"{left.url}/{route}", json=fields, stream=True, timeout=PATIENCE) as response:
        for line in response.iter_lines(chunk_size=1):
            if b"word" in line:
                break
    left.engine.wait_for(lambda engine: len(engine.aborted) == 1 and engine.active == 0, PATIENCE)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
def test_a_client_that_leaves_silence_is_noticed(served: Serve, fields: dict[str, Any]) -> None:
    """Nothing was said yet and nothing will be: a client that leaves is noticed all the same, streaming or not."""
    silent = served(ScriptedEngine(endless, manual=True))
    count = fields.get("n", 1)
    with pytest.raises(requests.RequestException):
        sent(requests.post(f"{silent.url}/chat/completions", json=body("x", **fields), timeout=0.5, stream=True))
    silent.engine.wait_for(lambda engine: len(engine.aborted) == count and engine.active == 0, PATIENCE)


def test_closing_the_official_clients_stream(served: Serve) -> None:
    """Leaving the client's stream as its documentation says ends the generation."""
    left = served(ScriptedEngine(endless, step_time=0.01))
    with left.client() as client:
        create: Any = client.chat.completions.create
        with create(model="scripted", messages=say("x"), stream=True, n=2) as stream:
            next(iter(stream))
    left.engine.wait_for(lambda engine: len(engine.aborted) == 2 and engine.active == 0, PATIENCE)
