"""Views that stream in Flask's own way: what they send, and that nothing runs on when nobody reads."""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import itertools
import random
import socket
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import flask
import pytest
from flask import Flask, Response, current_app, request, stream_with_context
from flask.signals import request_finished
from werkzeug.wsgi import FileWrapper

import lmbridge
from lmbridge import Delta, DisconnectedError, LMBridgeError, RequestAbortedError
from lmbridge.flask import LMBridge, answered, current_bridge, disconnected, failed, scope
from lmbridge.flask.models import models_of
from lmbridge.flask.reporting import Reporter
from lmbridge.flask.testing import scripted_engine
from tests.conftest import until
from tests.flask.conftest import Serve, on_serve, on_waitress, on_werkzeug

PATIENCE = 20.0  # seconds after which a test is taken to hang
WORDS = "one two three"

lm = LMBridge()


def text_of(delta: Delta) -> str:
    return delta.text


def generator_expression() -> Response:
    return Response(delta.text for delta in current_bridge.stream(WORDS))


def bare_generator() -> Iterator[str]:
    return (delta.text for delta in current_bridge.stream(WORDS))


def asked_while_sent() -> Response:
    @stream_with_context
    def parts() -> Iterator[str]:
        for delta in current_bridge.stream(request.args["words"]):
            yield delta.text

    return Response(parts())  # type: ignore[call-arg]  # Flask's annotation has the decorator want the iterator


def several_contexts() -> Response:
    """Each generator ends Flask's contexts once more."""

    def parts(words: str) -> Iterator[str]:
        yield from (delta.text for delta in current_bridge.stream(words))

    first, second = stream_with_context(parts("one two ")), stream_with_context(parts("three"))
    return Response(itertools.chain(first, second))


def several_streams() -> Response:
    streams = [current_bridge.stream(words) for words in ("one ", "two ", "three")]
    return Response(delta.text for stream in streams for delta in stream)


def several_at_once() -> Response:
    group = current_bridge.stream_many(["one ", "two ", "three"])

    def whole() -> Iterator[str]:
        texts = ["", "", ""]
        for index, delta in group:
            texts[index] += delta.text
        yield from texts

    return Response(whole())


def future() -> Response:
    answer = current_bridge.submit(WORDS)
    return Response(answer.result(PATIENCE).text for _ in range(1))


def passed_through() -> Response:
    parts = (delta.text.encode() for delta in current_bridge.stream(WORDS))
    return Response(parts, direct_passthrough=True)


def mapped() -> Response:
    return Response(map(text_of, current_bridge.stream(WORDS)))


VIEWS = (
    generator_expression, bare_generator, asked_while_sent, several_contexts, several_streams, several_at_once, future,
    passed_through, mapped,
)  # fmt: skip
NAMES = [view.__name__ for view in VIEWS]


def create_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({"LMBRIDGE_MODEL": "demo", "LMBRIDGE_TIMEOUT": PATIENCE, **config})
    lm.init_app(app)
    for view in VIEWS:
        app.add_url_rule(f"/{view.__name__}", view_func=view)

    @app.get("/slow")
    def slow() -> Response:
        """Streams, and has something beside the stream."""
        current_bridge.submit("beside it")
        stream = current_bridge.stream("a b c")

        def parts() -> Iterator[str]:
            yield "begun "
            yield from (delta.text for delta in stream)

        return Response(parts())

    return app


@pytest.fixture
def app() -> Iterator[Flask]:
    app = create_app()
    yield app
    models_of(app).close()


def get(url: str, timeout: float = PATIENCE) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.parametrize("view", NAMES)
def test_it_streams(app: Flask, view: str) -> None:
    """The most common ways to write a view that streams; an empty 200 would tell nobody of a mistake."""
    with scripted_engine(app) as engine:
        assert app.test_client().get(f"/{view}?words={WORDS}").text == WORDS
        engine.wait_for(lambda engine: engine.active == 0)
        assert engine.aborted == []


def test_it_streams_over_http(serve: Serve, app: Flask) -> None:
    """The same by real servers, which run the generator in their own time."""
    with scripted_engine(app) as engine, serve(app) as url:
        for view in NAMES:
            assert get(f"{url}/{view}?words={WORDS.replace(' ', '+')}").decode() == WORDS, view
        engine.wait_for(lambda engine: engine.active == 0)
        assert engine.aborted == []


def test_each_part_is_sent_as_it_comes(app: Flask) -> None:
    """A response that waits for the whole answer is no stream."""
    with scripted_engine(app, manual=True) as engine, on_serve(app) as url, open_request(url, "/slow") as client:
        assert read_until(client, b"begun ").startswith(b"HTTP/1.1 200")
        engine.wait_for(lambda engine: engine.active == 2)
        engine.step()
        read_until(client, b"a\r\n")
        engine.step(2)
        read_until(client, b"c\r\n")


# --- when nobody reads on ---


def open_request(url: str, path: str, method: str = "GET") -> socket.socket:
    """Send a request, and leave its answer unread."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    found = b""
    while end not in found:
        part = connection.recv(1000)
        assert part, found
        found += part
    return found


def test_a_client_that_leaves_a_plain_stream(serve: Serve, app: Flask) -> None:
    """While the model is silent no write fails; all that the request has running is stopped all the same."""
    errors: list[BaseException] = []
    gone = threading.Event()

    def on_failure(sender: Flask, model: str, error: BaseException) -> None:
        errors.append(error)

    def on_gone(sender: Flask, model: str) -> None:
        gone.set()

    with (
        scripted_engine(app, manual=True) as engine,
        serve(app) as url,
        failed.connected_to(on_failure, app),
        disconnected.connected_to(on_gone, app),
    ):
        connection = open_request(url, "/slow")
        engine.wait_for(lambda engine: engine.active == 2)
        read_until(connection, b"begun ")
        connection.close()
        engine.wait_for(lambda engine: engine.active == 0)
        assert gone.wait(PATIENCE)
        assert models_of(app).disconnects == 1
    assert [type(error) for error in errors] == [DisconnectedError, DisconnectedError]


def test_a_response_that_is_closed_early(app: Flask) -> None:
    """A server that cannot write any more closes the response: whatever the request has running ends, and is told."""
    told: list[Any] = []

    def on_gone(sender: Flask, model: str) -> None:
        told.append(model)

    def on_failure(sender: Flask, model: str, error: BaseException) -> None:
        told.append(type(error))

    with (
        scripted_engine(app, manual=True) as engine,
        disconnected.connected_to(on_gone, app),
        failed.connected_to(on_failure, app),
    ):
        answer = app.test_client().get("/slow")
        assert next(answer.iter_encoded()) == b"begun "
        engine.wait_for(lambda engine: engine.active == 2)
        answer.close()
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 2
    assert told == [DisconnectedError, DisconnectedError, "demo"]
    assert models_of(app).disconnects == 1


def test_what_runs_beside_a_stream_ends_with_it(app: Flask) -> None:
    """A future that nobody waits for must not outlive the response, also where a server forgets to close that."""
    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = app.test_client().get("/slow")
        body = pool.submit(lambda: b"".join(answer.iter_encoded()))
        engine.wait_for(lambda engine: engine.active == 2)
        engine.fail("a b c", ValueError("as told"))
        engine.step()
        with pytest.raises(LMBridgeError):
            body.result(PATIENCE)
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 1


@pytest.mark.parametrize("serving", [on_waitress, on_serve])
def test_a_stream_that_fails_does_not_look_whole(app: Flask, serving: Any) -> None:
    """Half an answer that ends like a whole one would be taken for it: the connection breaks instead."""
    with scripted_engine(app, manual=True) as engine, serving(app) as url, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(get, f"{url}/slow")
        engine.wait_for(lambda engine: engine.active == 2)
        engine.step()
        engine.fail("a b c", ValueError("as told"))
        engine.step()
        with pytest.raises(http.client.IncompleteRead):
            answer.result(PATIENCE)


@pytest.mark.parametrize("serving", [on_werkzeug, on_waitress, on_serve])
def test_a_stream_that_is_too_slow_is_logged(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Servers pass over an OSError in silence, and a deadline is one: the log must say why the answer broke off."""
    app = create_app(LMBRIDGE_TIMEOUT=0.2)
    with (
        scripted_engine(app, manual=True),
        serving(app) as url,
        contextlib.suppress(OSError, http.client.HTTPException),
    ):
        get(f"{url}/slow")
    assert "was cut off" in caplog.text
    models_of(app).close()


def test_a_stream_that_fails_at_once_is_a_500(app: Flask) -> None:
    """What fails before anything was sent still has a status under ``lmbridge serve``."""
    with scripted_engine(app) as engine, on_serve(app) as url:
        engine.fail(WORDS, ValueError("as told"))
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(f"{url}/generator_expression")
        caught.value.close()
    assert caught.value.code == 500


def test_a_crowd_that_leaves_when_it_likes(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever clients leave, whatever was begun in their names ends, and is told of once."""
    begun: deque[str] = deque()  # each append is one atomic step
    ended: deque[str] = deque()

    class Counting(Reporter):
        def begun(self, request: lmbridge.Request) -> None:
            begun.append(request.id)
            super().begun(request)

        def ended(self, request: lmbridge.Request, outcome: lmbridge.Response | BaseException) -> None:
            ended.append(request.id)
            super().ended(request, outcome)

    def visit(url: str, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            path = f"/{rng.choice([*NAMES, 'slow'])}?words=one+two"
            with open_request(url, path) as connection, contextlib.suppress(OSError):
                connection.settimeout(rng.choice([PATIENCE, 0.02 * rng.random()]))
                for _ in range(rng.choice([1, 100])):
                    connection.recv(64)

    monkeypatch.setattr(scope, "Reporter", Counting)
    with scripted_engine(app, step_time=0.001) as engine, on_werkzeug(app) as url, ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(visit, url, seed) for seed in range(12)]:
            done.result(PATIENCE)
        engine.wait_for(lambda engine: engine.active == 0)
    assert len(begun) >= 100
    assert sorted(begun) == sorted(ended)
    until(lambda: models_of(app).bridge().requests() == [])


# --- where nothing streams ---


def test_a_plain_body_leaves_nothing_running(app: Flask) -> None:
    """The request is over when its body is there, also within an app's context that goes on, as tests have it."""

    @app.get("/left")
    def left() -> str:
        current_bridge.submit("left behind")
        engine.wait_for(lambda engine: engine.active == 1)
        return "plain"

    with scripted_engine(app, manual=True) as engine, app.app_context():
        assert app.test_client().get("/left").text == "plain"
        engine.wait_for(lambda engine: engine.active == 0)


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_a_response_without_a_body_leaves_nothing_running(serve: Serve, app: Flask, method: str, status: int) -> None:
    """Nobody will ever read the stream of a HEAD request or of a 304, and that is no client that has left."""

    @app.get("/none")
    def none() -> Response:
        stream = current_bridge.stream("a b")
        engine.wait_for(lambda engine: engine.active > 0)
        return Response((delta.text for delta in stream), status)

    with scripted_engine(app, manual=True) as engine:
        assert app.test_client().open("/none", method=method).get_data() == b""  # and nobody closes it
        engine.wait_for(lambda engine: engine.active == 0)
        with serve(app) as url, open_request(url, "/none", method) as connection:
            assert f" {status} ".encode() in read_until(connection, b"\r\n")
            engine.wait_for(lambda engine: engine.active == 0)
        assert models_of(app).disconnects == 0


def test_files_pass_as_they_are(app: Flask) -> None:
    """Servers send files by means of their own, as long as nobody wraps them."""
    bodies: list[Any] = []

    @app.get("/file")
    def file() -> Response:
        return flask.send_file(__file__)

    def look(sender: Flask, response: Response) -> None:
        bodies.append(response.response)

    with request_finished.connected_to(look, app), app.test_client().get("/file") as answer:
        assert b"Servers send files" in answer.get_data()
    assert isinstance(bodies[0], FileWrapper)


# --- whoever is cut off is told ---


def test_a_reader_that_outlives_its_request_is_told_why(app: Flask) -> None:
    """A thread that a view leaves behind gets an error that says what to do, not a stream that just ends."""
    told: list[BaseException] = []
    threads: list[threading.Thread] = []

    @app.get("/thread")
    def thread() -> str:
        stream = current_bridge.stream("a b c")
        begun = threading.Event()

        def read() -> None:
            try:
                next(stream)
                begun.set()
                list(stream)
            except LMBridgeError as error:
                told.append(error)

        threads.append(threading.Thread(target=read))
        threads[0].start()
        begun.wait(PATIENCE)
        return "plain"

    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(app.test_client().get, "/thread")
        engine.wait_for(lambda engine: engine.active == 1)
        engine.step()
        assert answer.result(PATIENCE).text == "plain"
        threads[0].join(PATIENCE)
    (error,) = told
    assert type(error) is RequestAbortedError
    assert "return a response that streams it" in str(error)
    assert error.partial == "a"


def test_a_generator_without_a_context_is_told_what_to_write(app: Flask) -> None:
    """The other common way to write it fails in Flask's own words, which do not say how a generator gets a context."""

    @app.get("/late")
    def late() -> Response:
        def parts() -> Iterator[str]:
            yield from (delta.text for delta in current_bridge.stream(WORDS))

        return Response(parts())

    with pytest.raises(RuntimeError, match="stream_with_context"):
        app.test_client().get("/late")


def test_a_request_whose_client_has_gone_asks_nothing_more(app: Flask) -> None:
    """A view that goes on after its client went away must not start the model again."""

    @app.get("/again")
    def again() -> Response:
        def parts() -> Iterator[str]:
            try:
                yield current_bridge.infer("first").text
            finally:
                with pytest.raises(DisconnectedError):
                    current_bridge.infer("second")

        return Response(stream_with_context(parts()))

    with scripted_engine(app) as engine:
        answer = app.test_client().get("/again")
        answer.close()
        assert len(engine.started) == 1


# --- what happens to responses on their way ---


@pytest.mark.parametrize("after", ["request", "signal"])
def test_a_response_that_is_never_sent(app: Flask, after: str) -> None:
    """What comes after the view may fail, and its response is dropped: the stream ends, and the error is answered."""

    def fail(response: Response) -> Response:
        if response.status_code == 200:
            engine.wait_for(lambda engine: engine.active == 2)
            raise ValueError("as told")
        return response

    def hear(sender: Flask, response: Response) -> None:
        fail(response)

    if after == "request":
        app.after_request(fail)
    else:
        request_finished.connect(hear, app)
    with scripted_engine(app, manual=True) as engine:
        assert app.test_client().get("/slow").status_code == 500
        engine.wait_for(lambda engine: engine.active == 0)
        assert len(engine.aborted) == 2
    assert models_of(app).disconnects == 0


def test_an_error_that_streams(app: Flask) -> None:
    """A handler of errors may stream too, and asks anew: what the failed view had running has ended."""

    @app.get("/fails")
    def fails() -> Response:
        current_bridge.submit("left behind")
        engine.wait_for(lambda engine: engine.active == 1)
        raise KeyError("as told")

    @app.errorhandler(500)
    def sorry(error: Exception) -> tuple[Response, int]:
        engine.wait_for(lambda engine: engine.active == 0)
        return Response(delta.text for delta in current_bridge.stream("so sorry")), 500

    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: app.test_client().get("/fails"))
        engine.wait_for(lambda engine: len(engine.started) == 2 and engine.active == 1)
        engine.step(2)
        got = answer.result(PATIENCE)
        assert (got.status_code, got.text) == (500, "so sorry")


def test_a_context_within_a_request_ends_by_itself(app: Flask) -> None:
    """What a view asks inside an app context of its own ends there; its stream goes on."""

    @app.get("/nested")
    def nested() -> Response:
        stream = current_bridge.stream(WORDS)
        with current_app.app_context():
            current_bridge.submit("left in the inner context")
            engine.wait_for(lambda engine: engine.active == 2)
        return Response(delta.text for delta in stream)

    with scripted_engine(app, manual=True) as engine, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: app.test_client().get("/nested").text)
        engine.wait_for(lambda engine: len(engine.started) == 2 and engine.active == 1)
        engine.step(3)
        assert answer.result(PATIENCE) == WORDS


def test_requests_within_one_context(app: Flask) -> None:
    """Tests make requests inside one app context, whose ``g`` they then share; each is a request of its own."""
    with scripted_engine(app), app.app_context():
        for _ in range(2):
            assert app.test_client().get("/generator_expression").text == WORDS
        assert current_bridge.infer("by itself").text == "by itself"


def test_threads_of_a_request_share_its_bridge() -> None:
    """Threads with the request's context that ask at once must get one client, or the other is never closed."""
    both = threading.Barrier(2, timeout=PATIENCE)

    def account(request: Any) -> str:
        both.wait()  # both have seen that there is none yet
        return "one"

    app = Flask(__name__)
    app.config.update(LMBRIDGE_MODEL="demo")
    threads = LMBridge(app, account=account)
    with scripted_engine(app), app.test_request_context(), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(contextvars.copy_context().run, threads.bridge) for _ in range(2)]
        first, second = [found.result(PATIENCE) for found in asked]
        assert first is second


def test_every_prompt_of_a_list_is_told(app: Flask) -> None:
    """Whoever counts answers by the signal counts those of a list too, each once."""
    texts: list[str] = []

    def on_answer(sender: Flask, model: str, response: Any) -> None:
        texts.append(response.text)

    @app.get("/list")
    def several() -> list[str]:
        return [answer.text for answer in current_bridge.infer(["one", "two", "three"])]

    with scripted_engine(app), answered.connected_to(on_answer, app):
        assert app.test_client().get("/list").json == ["one", "two", "three"]
    assert sorted(texts) == ["one", "three", "two"]
