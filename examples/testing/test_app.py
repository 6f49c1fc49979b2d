"""The app's tests: a scripted engine answers in the model's place, and fails on cue. Run: ``python -m pytest``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import pytest
from app import create_app
from werkzeug.test import TestResponse

from lmbridge.flask.testing import scripted_engine

Asked = Future[TestResponse]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that wait while the test goes on."""
    with ThreadPoolExecutor() as pool:
        yield pool


def test_an_answer() -> None:
    """The script sees the request as the engine gets it, and gives the pieces of the answer."""
    app = create_app()
    with scripted_engine(app, script=lambda request: ["You said: ", request.prompt]):
        assert app.test_client().post("/ask", data={"prompt": "Hi"}).json == {"text": "You said: Hi"}


def test_a_stream() -> None:
    """An event may have several pieces, so the test compares the joined text; the last event says how it ended."""
    app = create_app()
    with scripted_engine(app, script=lambda request: ["Hello", " there"]):
        body = app.test_client().post("/tell", data={"prompt": "Hi"}).text
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert "".join(event.get("text", "") for event in events) == "Hello there"
    assert events[-1]["finish_reason"] == "stop"


def test_a_stream_piece_by_piece() -> None:
    """With an engine that waits for step(), each piece is an event of its own."""
    app = create_app()
    with scripted_engine(app, script=lambda request: ["Hello", " there"], manual=True) as engine:
        response = app.test_client().post("/tell", data={"prompt": "Hi"}, buffered=False)
        sent = response.iter_encoded()
        assert next(sent).startswith(b":")  # the comment that opens the stream
        engine.step()
        assert next(sent) == b'data: {"text": "Hello"}\n\n'
        engine.step()
        assert next(sent) == b'data: {"text": " there"}\n\n'
        response.close()


def test_a_reader_who_leaves() -> None:
    """A closed connection stops the engine, long before the answer is whole."""
    app = create_app()
    with scripted_engine(app, script=lambda request: ["word "] * 10_000, step_time=0.001) as engine:
        response = app.test_client().post("/tell", data={"prompt": "a"}, buffered=False)
        next(response.iter_encoded())
        response.close()
        engine.wait_for(lambda e: len(e.aborted) == 1)


def test_one_request_fails() -> None:
    """The others go on."""
    app = create_app()
    with scripted_engine(app) as engine:
        engine.fail("poison", ValueError("out of range"))
        assert app.test_client().post("/ask", data={"prompt": "poison"}).status_code == 500
        assert app.test_client().post("/ask", data={"prompt": "fine"}).status_code == 200


def test_the_engine_dies(pool: ThreadPoolExecutor) -> None:
    """What it was working on is answered by 503, which clients may repeat."""
    app = create_app()
    with scripted_engine(app, manual=True) as engine:
        asked: Asked = pool.submit(app.test_client().post, "/ask", data={"prompt": "a"})
        engine.wait_for(lambda e: e.active == 1)
        engine.crash(RuntimeError("device lost"))
        assert asked.result(10).status_code == 503


def test_the_queue_is_full(pool: ThreadPoolExecutor) -> None:
    """One request runs, one waits, and the third is sent away."""
    app = create_app(LMBRIDGE_MAX_PENDING=1)
    with scripted_engine(app, manual=True, max_batch_size=1) as engine:
        first: Asked = pool.submit(app.test_client().post, "/ask", data={"prompt": "a"})
        engine.wait_for(lambda e: e.active == 1)
        others: list[Asked] = [pool.submit(app.test_client().post, "/ask", data={"prompt": "b"}) for _ in range(2)]
        refused = next(as_completed(others, timeout=10))
        assert refused.result().status_code == 429
        engine.step()  # the first one's answer has one word
        engine.wait_for(lambda e: len(e.started) == 2)
        engine.step()
        assert sorted(asked.result(10).status_code for asked in (first, *others)) == [200, 200, 429]


def test_a_deadline() -> None:
    """An engine that makes no step runs into it at once, in a test's time."""
    app = create_app(LMBRIDGE_TIMEOUT=0.05)
    with scripted_engine(app, manual=True):
        assert app.test_client().post("/ask", data={"prompt": "a"}).status_code == 504


def test_a_slow_start(pool: ThreadPoolExecutor) -> None:
    """Requests that come while the model loads wait for it."""
    app, gate = create_app(), threading.Event()
    with scripted_engine(app, start_gate=gate) as engine:
        asked: Asked = pool.submit(app.test_client().post, "/ask", data={"prompt": "a"})
        engine.wait_for(lambda e: bool(e.threads))  # it has begun to load
        assert not asked.done()
        gate.set()
        assert asked.result(10).json == {"text": "a"}


def test_a_model_that_cannot_be_loaded() -> None:
    """A deployment whose files are missing answers 503."""
    app = create_app()
    with scripted_engine(app, start_error=OSError("no such weights")):
        assert app.test_client().post("/ask", data={"prompt": "a"}).status_code == 503
