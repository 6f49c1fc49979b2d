"""POST /v1/embeddings: the official client over real HTTP, and what surrounds it."""

from __future__ import annotations

import base64
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import openai
import pytest
import requests
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from lmbridge import Bridge, EngineError, InvalidRequestError
from lmbridge.flask.openai.embeddings import read_embeddings
from lmbridge.flask.testing import scripted_encoder
from lmbridge.testing import ScriptedEncoder, ScriptedEngine, vector_of
from tests.flask.openai.conftest import PATIENCE, build_app, serving

Ask = Callable[..., requests.Response]


@pytest.fixture
def encoder() -> ScriptedEncoder:
    return ScriptedEncoder(max_length=50)


@pytest.fixture
def bridge(encoder: ScriptedEncoder) -> Iterator[Bridge]:
    with closing(Bridge(encoder)) as bridge:
        yield bridge


@pytest.fixture
def client(bridge: Bridge) -> Iterator[OpenAI]:
    """The official client of a server that has a chat model and an encoder."""
    with (
        closing(Bridge(ScriptedEngine())) as chat,
        serving(build_app({"chat": chat, "encoder": bridge})) as address,
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture
def site(bridge: Bridge) -> Iterator[Callable[..., FlaskClient]]:
    """Builds test clients of apps over the encoder."""
    with ExitStack():
        yield lambda **config: build_app({"encoder": bridge}, **config).test_client()


def post(client: FlaskClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json=body)


def error_of(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = response.get_json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# --- the official client ---


def test_one_text(client: OpenAI) -> None:
    """A string gives one vector, and its tokens are counted."""
    answer = client.embeddings.create(model="encoder", input="The red fox")
    assert np.allclose(answer.data[0].embedding, vector_of("The red fox"))
    assert [(one.index, one.object) for one in answer.data] == [(0, "embedding")]
    assert (answer.object, answer.model) == ("list", "encoder")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


def test_lists_keep_their_order(client: OpenAI) -> None:
    """Each text of a list has its own vector at its own place, however they were batched."""
    texts = [f"text number {n}" for n in range(300)]
    answer = client.embeddings.create(model="encoder", input=texts)
    assert [one.index for one in answer.data] == list(range(300))
    assert np.allclose([one.embedding for one in answer.data], np.stack([vector_of(text) for text in texts]))
    assert answer.usage.total_tokens == 900


def test_token_ids(client: OpenAI) -> None:
    """Token ids are one text, lists of them are several."""
    one = client.embeddings.create(model="encoder", input=[1, 2, 3])
    two = client.embeddings.create(model="encoder", input=[[1, 2, 3], [4]])
    assert np.allclose(one.data[0].embedding, vector_of("1 2 3"))
    assert np.allclose([each.embedding for each in two.data], [vector_of("1 2 3"), vector_of("4")])


def test_encodings_are_equal(client: OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and gets the same numbers either way."""
    written = client.embeddings.create(model="encoder", input="a", encoding_format="base64").data[0].embedding
    plain = client.embeddings.create(model="encoder", input="a", encoding_format="float").data[0].embedding
    default = client.embeddings.create(model="encoder", input="a").data[0].embedding
    assert isinstance(written, str)
    assert np.array_equal(np.frombuffer(base64.b64decode(written), "<f4"), vector_of("a"))
    assert np.array_equal(np.asarray(plain, np.float32), vector_of("a"))
    assert np.array_equal(np.asarray(default, np.float32), vector_of("a"))


def test_dimensions(client: OpenAI) -> None:
    """Fewer dimensions come as asked, also as 3.0; more than the model has is the field's fault, not a text's."""
    answer = client.embeddings.create(model="encoder", input=["a", "b"], dimensions=3)
    assert [len(one.embedding) for one in answer.data] == [3, 3]
    same = client.embeddings.create(model="encoder", input=["a", "b"], extra_body={"dimensions": 3.0})
    assert same.data == answer.data
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="encoder", input=["a", "b"], dimensions=9)
    assert caught.value.param == "dimensions"
    assert "of the list" not in caught.value.message


def test_the_model_that_embeds_is_the_default(client: OpenAI) -> None:
    """A request that names no model is for the first that embeds, and a chat for the first that chats."""
    client.models.list()
    answer = client.embeddings.create(model="", input="a")
    assert answer.model == "encoder"
    chat = client.chat.completions.create(model="", messages=[{"role": "user", "content": "Hello"}])
    assert chat.choices[0].message.content == "Hello"


def test_extensions(client: OpenAI) -> None:
    """What OpenAI has no field for is sent as extra_body: a prompt before the text, raw lengths, cut ends."""
    ask = client.embeddings.create
    prompted = ask(model="encoder", input="a", extra_body={"prompt": "query: "})
    assert np.allclose(prompted.data[0].embedding, vector_of("query: a"))
    raw = ask(model="encoder", input="a", extra_body={"normalize": False})
    assert np.linalg.norm(raw.data[0].embedding) != pytest.approx(1, abs=0.01)
    for truncate in (True, "end"):
        assert ask(model="encoder", input="long " * 60, extra_body={"truncate": truncate}).data
    assert ask(model="encoder", input="a", user="somebody", extra_body={"unknown": 1}).data


# --- errors ---


def test_a_long_text_is_named(client: OpenAI) -> None:
    """The text that is too long is named by its place; the official client has message, code and param."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="encoder", input=["short", "long " * 60])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input[1]")
    assert "Input 1 of the list" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="encoder", input="long " * 60)
    assert caught.value.param == "input"
    assert "of the list" not in caught.value.message


def test_one_bad_text(client: OpenAI, encoder: ScriptedEncoder) -> None:
    """A text that the engine fails with is a 500 that says which; one that it refuses is a 400."""
    encoder.fail("bad", ValueError("no"))
    with pytest.raises(openai.InternalServerError, match="Input 1 of the list"):
        client.embeddings.create(model="encoder", input=["good", "bad"])
    encoder.refuse("worse", InvalidRequestError("never"))
    with pytest.raises(openai.BadRequestError, match="Input 0 of the list: never") as caught:
        client.embeddings.create(model="encoder", input=["worse", "good"])
    assert caught.value.param == "input[0]"
    passing = EngineError("lost")
    passing.retryable = True
    encoder.refuse("lost", passing)
    with pytest.raises(openai.InternalServerError) as failed:
        client.embeddings.create(model="encoder", input="lost")
    assert failed.value.status_code == 503


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "missing"),
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "at least one"),
        ({"input": [[]]}, "input", "token ids"),
        ({"input": ["a", 1]}, "input", "list of strings"),
        ({"input": [1, "a"]}, "input", "list of strings"),
        ({"input": [[1], ["a"]]}, "input", "list of strings"),
        ({"input": [-1]}, "input", "token ids"),
        ({"input": [True]}, "input", "token ids"),
        ({"input": {"text": "a"}}, "input", "a string"),
        ({"input": ["a"] * 2049}, "input", "input has 2,049 items; one request takes at most 2,048"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1"),
        ({"input": "a", "dimensions": "3"}, "dimensions", "an integer"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "user": 7}, "user", "a string"),
        ({"input": "a", "truncate": "start"}, "truncate", '"end"'),
        ({"input": "a", "prompt": 1}, "prompt", "a string"),
        ({"input": "a", "timeout": "soon"}, "timeout", "a number"),
        ({"input": "a", "timeout": -1}, "timeout", "from 0"),
        ({"input": "a", "timeout": 10**12}, "timeout", "from 0"),
        ({"input": "a", "model": 7}, "model", "a string"),
    ],
)
def test_bad_requests(site: Callable[..., FlaskClient], body: dict[str, Any], param: str, words: str) -> None:
    """What is wrong is told by the field's name, and nothing is sent to the engine."""
    response = post(site(), **body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert words in error_of(response)["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
FIELDS = ["input", "dimensions", "encoding_format", "user", "normalize", "prompt", "truncate", "model", "x"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_values_are_a_call_or_refused(values: dict[str, Any]) -> None:
    """Whatever a client sends is either understood or refused with the name of a field."""
    error: InvalidRequestError | None = None
    try:
        assert read_embeddings({"input": "a", **values}).texts is not None
    except InvalidRequestError as refused:
        error = refused
    assert error is None or error.param in {"input", *values}


def test_empty_strings_and_long_lists() -> None:
    """An empty string is a text like any other, and a full list is taken by a server with a short queue too."""
    with closing(Bridge(ScriptedEncoder(), when_full="reject", max_pending=8, max_pending_per_client=4)) as bridge:
        client = build_app({"encoder": bridge}).test_client()
        assert post(client, input="").status_code == 200
        response = post(client, input=["a", ""] * 1024)
        assert len(response.get_json()["data"]) == 2048


def test_models_of_another_kind() -> None:
    """Who asks the wrong model is told which one embeds; where none does, the engine says what it does."""
    with closing(Bridge(ScriptedEngine())) as chat, closing(Bridge(ScriptedEncoder(tasks=["embed"]))) as encoder:
        client = build_app({"chat": chat, "minilm": encoder}).test_client()
        chat.start()
        encoder.start()
        wrong = error_of(post(client, model="chat", input="a"))
        assert (wrong["param"], wrong["code"]) == ("model", "unsupported_task")
        assert wrong["message"] == "The model 'chat' cannot embed; use minilm instead."
        talk = client.post(
            "/v1/chat/completions", json={"model": "minilm", "messages": [{"role": "user", "content": "a"}]}
        )
        assert (talk.status_code, error_of(talk)["param"]) == (400, "model")
        assert "use chat instead" in error_of(talk)["message"]
        alone = build_app({"chat": chat}).test_client()
        for body in ({"model": "chat"}, {}):
            wrong = error_of(post(alone, input=["a"], **body))
            assert wrong["message"].startswith("The engine 'scripted' cannot embed")
            assert wrong["param"] == "model"
        lone = build_app({"minilm": encoder}).test_client()
        talk = lone.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert "cannot generate text (infer, stream); it can embed" in error_of(talk)["message"]
        assert error_of(talk)["param"] == "model"
        assert post(alone, model="none", input="a").status_code == 404


def test_models_say_what_they_do(client: OpenAI, bridge: Bridge) -> None:
    """The list of models has what each does, once that is known, where OpenAI's clients keep fields of others."""
    bridge.start()
    found = {model.id: (model.model_extra or {}).get("lmbridge") for model in client.models.list()}
    assert found == {"chat": None, "encoder": {"tasks": ["embed", "rerank"]}}


# --- what it shares with chats ---


def test_keys_ids_methods_and_cors(site: Callable[..., FlaskClient], encoder: ScriptedEncoder) -> None:
    """Keys, request ids, origins and wrong methods are as on every other route."""
    client = site(api_keys=["k"], cors_origins=["https://a.example"])
    assert post(client, input="a").status_code == 401
    headers = {"Authorization": "Bearer k", "x-request-id": "trace-1", "Origin": "https://a.example"}
    response = client.post("/v1/embeddings", json={"input": ["a", "b"]}, headers=headers)
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "trace-1"
    assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert [name.startswith("trace-1") for name in encoder.started] == [True, True]
    assert client.get("/v1/embeddings", headers=headers).status_code == 405
    assert client.post("/v1/embeddings", data=b"{}", headers=headers).status_code == 415


def test_deadlines() -> None:
    """The client's time and the server's end a request with 504, and its texts leave the engine."""
    encoder = ScriptedEncoder(manual=True)
    with closing(Bridge(encoder)) as bridge:
        client = build_app({"encoder": bridge}).test_client()
        assert post(client, input=["a", "b"], timeout=0.1).status_code == 504
        assert post(build_app({"encoder": bridge}, timeout=0.1).test_client(), input="a").status_code == 504
        encoder.wait_for(lambda encoder: encoder.active == 0)


def test_a_full_queue_is_429() -> None:
    """A server that is full says so at once, and when to come again."""
    encoder = ScriptedEncoder(manual=True, max_batch_size=1)
    with closing(Bridge(encoder, max_pending=1, when_full="reject")) as bridge:
        first = bridge.submit_embed("a")
        encoder.wait_for(lambda encoder: encoder.active == 1)
        second = bridge.submit_embed("b")
        response = post(build_app({"encoder": bridge}).test_client(), input=["c"])
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
        first.cancel()
        second.cancel()


def test_a_client_that_leaves() -> None:
    """A connection that is dropped takes its texts out of the engine and the queue, while nothing is sent to it."""
    encoder = ScriptedEncoder(manual=True, max_batch_size=2)
    with closing(Bridge(encoder)) as bridge, serving(build_app({"encoder": bridge})) as address:
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            body = b'{"input": ["a", "b", "c", "d"]}'
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            encoder.wait_for(lambda encoder: encoder.active == 2, PATIENCE)
        encoder.wait_for(lambda encoder: encoder.active == 0, PATIENCE)


@pytest.mark.parametrize("asked", [False, True])
def test_texts_in_logs(site: Callable[..., FlaskClient], caplog: pytest.LogCaptureFixture, asked: bool) -> None:
    """No text is logged unless that was asked for."""
    caplog.set_level(logging.DEBUG, "lmbridge")
    assert post(site(log_prompts=asked), input=["a secret"]).status_code == 200
    assert ("a secret" in caplog.text) == asked


def test_many_clients_share_batches(client: OpenAI, encoder: ScriptedEncoder) -> None:
    """Each of many clients gets the vectors of its own texts, and their texts go to the model together."""

    def ask(place: int) -> bool:
        answer = client.embeddings.create(model="encoder", input=[f"{place} {n}" for n in range(8)])
        wanted = np.stack([vector_of(f"{place} {n}") for n in range(8)])
        return np.allclose([one.embedding for one in answer.data], wanted)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))
    assert encoder.stats()["items"] == 48 * 8


def test_apps_are_tested_with_a_scripted_encoder() -> None:
    """A user's test puts an encoder that needs no model in the real one's place, and knows its vectors."""
    with closing(Bridge(ScriptedEngine())) as real:
        app = build_app({"real": real})
        with scripted_encoder(app) as encoder:
            (found,) = post(app.test_client(), input="a").get_json()["data"]
        assert np.allclose(found["embedding"], vector_of("a"))
        assert encoder.started
