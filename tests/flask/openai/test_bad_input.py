"""Whatever is thrown at the routes: an answer or a 4xx in the envelope, and an engine that goes on answering."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from lmbridge import Bridge
from lmbridge.flask.openai.table import CHAT, COMPLETIONS
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import build_app

ROUTES = ("/v1/chat/completions", "/v1/completions")
FIELDS = sorted({*CHAT, *COMPLETIONS, "unknown"})
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([10**30, -(10**30), "", "\x00", "\ud800", "a" * 10_000, 1e308, 5e-324, -0.0, 2**63, 2**31])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5), max_leaves=10
)
CALLS = st.fixed_dictionaries(
    {}, optional={"id": VALUES, "function": st.fixed_dictionaries({}, optional={"name": VALUES, "arguments": VALUES})}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "tool", "x"]) | VALUES, "content": VALUES,
            "reasoning": VALUES, "tool_calls": st.lists(CALLS) | VALUES, "tool_call_id": VALUES,
        },
    )
    | VALUES,
    max_size=4,
)  # fmt: skip
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello", "max_tokens": 4}

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def app() -> Iterator[FlaskClient]:
    with Bridge(ScriptedEngine()) as bridge:
        yield build_app({"scripted": bridge}, max_request_bytes=100_000).test_client()


@pytest.fixture(scope="module")
def real() -> Iterator[FlaskClient]:
    with Bridge("demo") as bridge:
        yield build_app({"demo": bridge}).test_client()


def judge(client: FlaskClient, response: TestResponse) -> None:
    """An answer, or the client's fault said in the envelope; and the engine answers the next."""
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code == 200:
        assert '"error"' not in response.text or response.is_json, response.text
    else:
        body: Any = response.get_json()
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
    good = client.post(ROUTES[0], json={"messages": GOOD["messages"], "max_tokens": 3, "temperature": 0})
    assert good.status_code == 200, good.text
    answer: Any = good.get_json()
    assert answer["choices"][0]["message"]["content"]


def post(client: FlaskClient, route: str, body: bytes) -> TestResponse:
    return client.post(route, data=body, content_type="application/json")


@fuzz
@given(st.sampled_from(ROUTES), st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(ROUTES[0], b"")
@example(ROUTES[0], b"[" * 90_000)
@example(ROUTES[0], b'{"messages":' * 10_000)
@example(ROUTES[1], b'{"prompt": "' + b"\\ud800" * 1000 + b'"}')
@example(ROUTES[1], b'{"seed": ' + b"9" * 90_000 + b"}")
@example(ROUTES[1], b'{"temperature": NaN}')
@example(ROUTES[1], b"\xef\xbb\xbf{}")
@example(ROUTES[0], b"x" * 200_000)
def test_any_bytes(app: FlaskClient, route: str, body: bytes) -> None:
    """Bytes that are no request are the client's fault."""
    judge(app, post(app, route, body))


@fuzz
@given(st.sampled_from(ROUTES), st.dictionaries(st.sampled_from(FIELDS), VALUES | MESSAGES), st.booleans())
@example(ROUTES[0], {"messages": [{"role": "user", "content": "\ud800"}]}, False)
@example(ROUTES[0], {"stream": True, "n": 128}, True)
@example(ROUTES[1], {"prompt": ["x"] * 5000}, True)
@example(ROUTES[1], {"prompt": list(range(10_000))}, False)
@example(ROUTES[0], {"stop": ["a"] * 20_000}, True)
@example(ROUTES[0], {"model": "\x00\n../../etc/passwd"}, True)
def test_any_values(app: FlaskClient, route: str, fields: dict[str, Any], complete: bool) -> None:
    """Any value in any field of a request that is otherwise whole, or of one that is not."""
    body = {**(GOOD if complete else {}), **fields}
    judge(app, post(app, route, json.dumps(body).encode()))


@fuzz
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "top_k": st.integers(-1, 2**31 - 1),
            "min_p": st.floats(0, 1), "repetition_penalty": st.floats(0.01, 100), "seed": st.integers(-(2**63), 2**62),
            "stop": st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1), max_size=4), "n": st.integers(1, 3),
            "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=5), "ignore_eos": st.booleans(),
            "logprobs": st.integers(0, 20), "prompt": st.text(min_size=1) | st.lists(st.integers(0, 5000), min_size=1),
            "stream": st.booleans(), "echo": st.booleans(), "max_tokens": st.integers(1, 4), "min_tokens": st.just(1),
            "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, 3071).map(str), st.floats(-100, 100), max_size=5),
            "return_token_ids": st.booleans(), "include_stop_str_in_output": st.booleans(),
        },
    )
)  # fmt: skip
@example({"temperature": 1e-5, "repetition_penalty": 0.01, "logprobs": 20})
@example({"top_p": 5e-324, "min_p": 1.0, "logprobs": 0})
@example({"prompt": "a\x00b", "stop": "\x00"})
@example({"stop_token_ids": [2**31 - 1], "top_k": 2**31 - 1})
@example({"echo": True, "logprobs": 20, "prompt": [3071], "max_tokens": 0, "stream": True})
@example({"logit_bias": {str(token): -100 for token in range(1024)}, "frequency_penalty": -2, "max_tokens": 4})
@example({"truncate_prompt_tokens": 2**31 - 1, "min_tokens": 4, "stop": "a"})
@pytest.mark.long
def test_extremes_reach_the_model(real: FlaskClient, fields: dict[str, Any]) -> None:
    """What is possible but extreme goes through the real model's sampling without breaking it."""
    judge(real, post(real, ROUTES[1], json.dumps({**GOOD, **fields}).encode()))


@pytest.mark.parametrize(("words", "status"), [(20, 200), (800, 200), (2000, 400), (700_000, 400)])
def test_prompts_of_any_size(real: FlaskClient, words: int, status: int) -> None:
    """From a short prompt to one near the limit of a body: an answer, or that it is too long."""
    for prompt in ({"messages": [{"role": "user", "content": "word " * words}]}, {"prompt": [7] * words}):
        response = post(real, ROUTES["prompt" in prompt], json.dumps({"max_tokens": 2, **prompt}).encode())
        assert response.status_code == status, response.text
        judge(real, response)


@fuzz
@given(st.text(), st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]))
def test_any_path(app: FlaskClient, path: str, method: str) -> None:
    """Any path below the prefix by any method."""
    response = app.open("/v1/models/" + path.encode("utf-8", "replace").decode(), method=method)
    assert response.status_code in (200, 308, 404, 405)
    if response.status_code >= 400 and method != "HEAD":
        body: Any = response.get_json()
        assert body["error"]["message"]


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["Authorization", "x-request-id", "Origin", "Accept"]), st.text("\x01é ~:;,", max_size=300)
    )
)
def test_any_headers(app: FlaskClient, headers: dict[str, str]) -> None:
    """Headers of any content harm nobody."""
    assert app.get("/v1/models", headers=headers).status_code == 200
