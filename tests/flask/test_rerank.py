"""The reranking routes: each dialect as its clients send and read it, over real HTTP where the client is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge import Bridge, InvalidRequestError
from lmbridge.flask import LMBridge, openai, rerank
from lmbridge.flask.rerank.reading import RerankCall, read_cohere, read_tei
from lmbridge.flask.serving import create_app
from lmbridge.testing import ScriptedEncoder, ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, serving

QUERY = "red fox"
DOCUMENTS = ["a hen", "the red fox", "a fox"]
BEST_FIRST = [(1, 1.0), (2, 0.5), (0, 0.0)]
LITELLM = "needs litellm: pip install litellm"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/v2/rerank": {"query": QUERY, "documents": DOCUMENTS, "model": "ranker"},
    "/rerank": {"query": QUERY, "texts": DOCUMENTS},
}


@pytest.fixture
def encoder() -> ScriptedEncoder:
    return ScriptedEncoder(tasks=["rerank"], max_length=50)


@pytest.fixture
def build(encoder: ScriptedEncoder) -> Iterator[Callable[..., Flask]]:
    """Builds apps with a chat model, which is loaded, and a reranker, which is not yet."""
    with Bridge(ScriptedEngine()) as chat, closing(Bridge(encoder)) as ranker:

        def build(**config: Any) -> Flask:
            app = Flask(__name__)
            app.config["LMBRIDGE_MODELS"] = {"chat": chat, "ranker": ranker}
            app.config.update({f"LMBRIDGE_{name.upper()}": value for name, value in config.items()})
            LMBridge(app)
            app.register_blueprint(openai.blueprint)
            app.register_blueprint(rerank.blueprint)
            return app

        yield build


@pytest.fixture
def client(build: Callable[..., Flask]) -> FlaskClient:
    return build().test_client()


@pytest.fixture
def address(build: Callable[..., Flask]) -> Iterator[str]:
    with serving(build()) as address:
        yield address


# --- the dialects ---


@pytest.mark.parametrize(("path", "version"), [("/v1/rerank", "1"), ("/v2/rerank", "2")])
def test_cohere(client: FlaskClient, path: str, version: str) -> None:
    """The best comes first with its place in the list that was sent; the tokens that were read are counted."""
    answer = client.post(path, json=BODIES[path]).get_json()
    assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == BEST_FIRST
    assert all(set(one) == {"index", "relevance_score"} for one in answer["results"])
    assert answer["id"].startswith("rerank-")
    assert answer["model"] == "ranker"
    assert answer["usage"] == {"prompt_tokens": 13, "total_tokens": 13}
    assert answer["meta"]["api_version"] == {"version": version}
    assert answer["meta"]["tokens"] == {"input_tokens": 13, "output_tokens": 0}


def test_documents_come_back(client: FlaskClient) -> None:
    """Documents may be objects, whose text counts; they come back as they were sent, and only when asked for."""
    documents = [{"text": "a hen", "title": "Hens"}, "the red fox"]
    body = {"query": QUERY, "documents": documents, "return_documents": True, "rank_fields": ["text"]}
    first, second = client.post("/v1/rerank", json=body).get_json()["results"]
    assert first["document"] == {"text": "the red fox"}
    assert second["document"] == {"text": "a hen", "title": "Hens"}


def test_the_best_alone(client: FlaskClient) -> None:
    """``top_n`` bounds the answer, also beyond the number of documents; fields that change no score are tolerated."""
    body = {**BODIES["/v1/rerank"], "max_chunks_per_doc": 3, "max_tokens_per_doc": 4096, "priority": 1}
    assert len(client.post("/v1/rerank", json={**body, "top_n": 2}).get_json()["results"]) == 2
    assert len(client.post("/v1/rerank", json={**body, "top_n": 99}).get_json()["results"]) == 3


def test_tei(client: FlaskClient) -> None:
    """A list of places and scores, with the texts when asked for; what TEI's clients send by default is taken."""
    body = {**BODIES["/rerank"], "raw_scores": False, "truncate": False, "truncation_direction": "Right"}
    assert client.post("/rerank", json=body).get_json() == [
        {"index": index, "score": score} for index, score in BEST_FIRST
    ]
    (best, *_) = client.post("/rerank", json={**body, "return_text": True}).get_json()
    assert best == {"index": 1, "score": 1.0, "text": "the red fox"}


def test_the_bare_route_takes_documents(client: FlaskClient) -> None:
    """vLLM's and infinity's clients send Cohere's form to the route without a version, and get it back."""
    answer = client.post("/rerank", json=BODIES["/v1/rerank"]).get_json()
    assert [one["index"] for one in answer["results"]] == [1, 2, 0]


def test_long_documents(client: FlaskClient) -> None:
    """A document longer than the model reads is cut off; TEI's clients may have it refused, and are told which."""
    long = ["short", "red " * 60]
    assert client.post("/v1/rerank", json={"query": QUERY, "documents": long}).status_code == 200
    body = {"query": QUERY, "texts": long}
    assert client.post("/rerank", json=body).status_code == 200
    refused = client.post("/rerank", json={**body, "truncate": False})
    assert refused.status_code == 400
    assert refused.get_json()["param"] == "texts[1]"
    assert refused.get_json()["code"] == "context_length_exceeded"


# --- errors ---


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/rerank", {"query": None}, "query", "missing"),
        ("/v1/rerank", {"query": 1}, "query", "a string"),
        ("/v1/rerank", {"documents": None}, "documents", "missing"),
        ("/v1/rerank", {"documents": []}, "documents", "at least one"),
        ("/v1/rerank", {"documents": "a"}, "documents", "a list"),
        ("/v1/rerank", {"documents": ["a", 1]}, "documents[1]", "a string"),
        ("/v1/rerank", {"documents": ["a", {"title": "b"}]}, "documents[1]", '{"text"'),
        ("/v1/rerank", {"documents": ["a"] * 2049}, "documents", "at most 2,048"),
        ("/v1/rerank", {"top_n": 0}, "top_n", "from 1"),
        ("/v1/rerank", {"return_documents": "yes"}, "return_documents", "true or false"),
        ("/v1/rerank", {"rank_fields": ["title"]}, "rank_fields", "by their text"),
        ("/v2/rerank", {"relevant_spans": {"mode": "enabled"}}, "relevant_spans", "scores whole documents"),
        ("/v2/rerank", {"instruction": "be strict"}, "instruction", "no instructions"),
        ("/v2/rerank", {"timeout": "soon"}, "timeout", "a number"),
        ("/rerank", {"texts": None}, "texts", "missing"),
        ("/rerank", {"texts": [{"text": "a"}]}, "texts[0]", "a string"),
        ("/rerank", {"raw_scores": True}, "raw_scores", "false"),
        ("/rerank", {"truncation_direction": "Left"}, "truncation_direction", "right"),
    ],
)
def test_bad_requests(client: FlaskClient, path: str, body: dict[str, Any], param: str, words: str) -> None:
    """What is wrong, or would change the order and cannot be done, is told by the client's own name for it."""
    response = client.post(path, json={**BODIES[path], **body})
    assert response.status_code == 400
    said = response.get_json()
    error = said if path == "/rerank" else said["error"]
    assert error["param"] == param
    assert words in (said["error"] if path == "/rerank" else said["message"])


def test_errors_in_each_form(client: FlaskClient, encoder: ScriptedEncoder) -> None:
    """Cohere's clients find a ``message``, TEI's a text as ``error``, with the status that any client knows."""
    encoder.fail("the red fox", ValueError("no"))
    said = client.post("/v1/rerank", json=BODIES["/v1/rerank"])
    assert said.status_code == 500
    assert said.get_json()["message"].startswith("Document 1 of the list")
    encoder.refuse("a hen", InvalidRequestError("never"))
    said = client.post("/rerank", json=BODIES["/rerank"])
    assert said.get_json() == {
        "error": "Text 0 of the list: never", "error_type": "validation", "param": "texts[0]", "code": None
    }  # fmt: skip
    for path in BODIES:
        wrong = client.get(path)
        assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
        assert wrong.is_json
        assert client.post(path, data="{}").status_code == 415
        assert client.post(path, data="{", content_type="application/json").status_code == 400


def test_models_of_another_kind(client: FlaskClient) -> None:
    """The first that reranks is the default; who names another hears which one does."""
    for path, body in BODIES.items():
        assert client.post(path, json={**body, "model": ""}).status_code == 200
        wrong = client.post(path, json={**body, "model": "chat"})
        assert wrong.status_code == 400
        assert "use ranker instead" in wrong.text
        assert client.post(path, json={**body, "model": "none"}).status_code == 404
    embeds = client.post("/v1/embeddings", json={"model": "ranker", "input": "a"})
    assert embeds.status_code == 400
    assert "can rerank" in embeds.get_json()["error"]["message"]


def test_keys_ids_and_deadlines(build: Callable[..., Flask], encoder: ScriptedEncoder) -> None:
    """Keys, request ids, origins and deadlines are as on the other routes, without the routes of OpenAI too."""
    client = build(api_keys=["k"], cors_origins="*").test_client()
    for path, body in BODIES.items():
        assert client.post(path, json=body).status_code == 401
        headers = {"Authorization": "Bearer k", "x-request-id": "trace-1", "Origin": "https://a.example"}
        response = client.post(path, json=body, headers=headers)
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "trace-1"
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        encoder.forget("the red fox")
        late = client.post(path, json={**body, "timeout": 0.1}, headers=headers)
        assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
        encoder._forgetting.clear()
    assert all(name.startswith("trace-1") for name in encoder.started)


def test_a_crowd_and_the_end(encoder: ScriptedEncoder) -> None:
    """A server that has no place left, or shuts down, says so in the dialect, and when to come again."""
    with closing(Bridge(encoder)) as bridge:
        app = create_app({"LMBRIDGE_MODEL": bridge}, page=False)
        crowd = {"environ_overrides": {"lmbridge.crowded": True}}
        said = app.test_client().post("/v2/rerank", json=BODIES["/v2/rerank"], **crowd)
        assert (said.status_code, said.get_json()["error"]["code"]) == (429, "queue_full")
        said = app.test_client().post("/rerank", json=BODIES["/rerank"], **crowd)
        assert (said.status_code, said.get_json()["error_type"]) == (429, "overloaded")
        app.extensions["lmbridge"].draining = True
        said = app.test_client().post("/rerank", json=BODIES["/rerank"])
        assert (said.status_code, said.get_json()["error_type"]) == (503, "unhealthy")
        assert said.headers["Retry-After"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
FIELDS = ["query", "documents", "texts", "top_n", "return_documents", "rank_fields", "relevant_spans", "instruction",
          "raw_scores", "return_text", "truncate", "truncation_direction", "timeout", "model", "user", "x"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([read_cohere, read_tei]), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_values_are_a_call_or_refused(read: Callable[[dict[str, Any]], RerankCall], values: dict[str, Any]) -> None:
    """Whatever a client sends is either understood or refused with the name of a field that it sent or has to send."""
    body = {"query": "a", "documents" if read is read_cohere else "texts": ["a"], **values}
    error: InvalidRequestError | None = None
    try:
        assert read(body).documents
    except InvalidRequestError as refused:
        error = refused
    assert error is None or str(error.param).partition("[")[0] in {*body, "documents", "texts"}


# --- real clients ---


@pytest.mark.long
def test_the_cohere_client(address: str) -> None:
    """Cohere's own client, of both versions of its API: order, scores, documents, errors."""
    cohere = pytest.importorskip("cohere", reason="needs Cohere's client: pip install cohere")
    old = cohere.Client("none", base_url=address, timeout=PATIENCE)
    answer = old.rerank(model="ranker", query=QUERY, documents=DOCUMENTS, return_documents=True, top_n=2)
    assert [(one.index, one.relevance_score) for one in answer.results] == BEST_FIRST[:2]
    assert answer.results[0].document.text == "the red fox"
    assert answer.meta.tokens.input_tokens == 13
    plain = old.rerank(query=QUERY, documents=[{"text": text} for text in DOCUMENTS])
    assert [one.index for one in plain.results] == [1, 2, 0]
    assert plain.results[0].document is None
    new = cohere.ClientV2("none", base_url=address, timeout=PATIENCE)
    answer = new.rerank(model="ranker", query=QUERY, documents=DOCUMENTS)
    assert [(one.index, one.relevance_score) for one in answer.results] == BEST_FIRST
    with pytest.raises(cohere.errors.BadRequestError) as caught:
        new.rerank(model="chat", query=QUERY, documents=DOCUMENTS)
    assert "use ranker instead" in caught.value.body["message"]
    with pytest.raises(cohere.errors.NotFoundError):
        new.rerank(model="none", query=QUERY, documents=DOCUMENTS)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # it warns of its own types
@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "infinity", "huggingface"])
def test_litellm(address: str, provider: str) -> None:
    """litellm in each of the dialects that it speaks: the order, and the documents where they were asked for."""
    litellm = pytest.importorskip("litellm", reason=LITELLM)
    with_documents = provider != "infinity"  # it wants them as plain strings, where the others want objects
    answer = litellm.rerank(
        model=f"{provider}/ranker", query=QUERY, documents=DOCUMENTS, return_documents=with_documents, top_n=2,
        api_base=address, api_key="none", timeout=PATIENCE,
    )  # fmt: skip
    assert [(one["index"], one["relevance_score"]) for one in answer.results] == BEST_FIRST[:2]
    if with_documents:
        assert answer.results[0]["document"]["text"] == "the red fox"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_litellm_embeds(build: Callable[..., Flask]) -> None:
    """litellm's embeddings, through the provider for OpenAI-compatible servers."""
    litellm = pytest.importorskip("litellm", reason=LITELLM)
    with closing(Bridge(ScriptedEncoder())) as bridge:
        app = Flask(__name__)
        app.config["LMBRIDGE_MODELS"] = {"minilm": bridge}
        LMBridge(app)
        app.register_blueprint(openai.blueprint)
        with serving(app) as address:
            answer = litellm.embedding(
                model="openai/minilm", input=["a", "b c"], api_base=f"{address}/v1", api_key="none", timeout=PATIENCE
            )
    assert [len(one["embedding"]) for one in answer.data] == [8, 8]
    assert answer.usage.prompt_tokens == 3


def test_curl_as_documented(address: str) -> None:
    """A plain POST over a real connection, which is what most rerank clients are."""
    for path, body in BODIES.items():
        assert requests.post(f"{address}{path}", json=body, timeout=PATIENCE).status_code == 200
