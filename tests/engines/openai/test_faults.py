"""Servers that refuse, fill up, fall silent, talk nonsense and go away: what a caller hears, and what goes on."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import (
    Bridge,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    LMBridgeError,
    MissingDependencyError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
)
from lmbridge.engines.openai import errand, errors, library
from lmbridge.engines.openai import server as one
from lmbridge.testing import ScriptedEngine
from tests.conftest import until
from tests.engines.openai.conftest import PATIENCE, Far, Rude, answer, chunk, events, far_end, http, rude_server


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is asked ten times a second, and one that is unwell as often."""
    monkeypatch.setattr(one, "LOOK", 0.1)
    monkeypatch.setattr(errors, "_USUAL_WAIT", 0.1)


def error_body(message: str = "No.", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


def ask(url: str, **options: Any) -> LMBridgeError:
    """What one request ends with that fails."""
    with Bridge(url, **options) as bridge, pytest.raises(LMBridgeError) as caught:
        bridge.infer("hello", timeout=PATIENCE)
    return caught.value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- errors by their class ---

LONG = "This model's maximum context length is 100 tokens. However, you requested 612 tokens."


@pytest.mark.parametrize(
    ("status", "body", "kind", "retryable", "words"),
    [
        (400, error_body("top_p must be less.", param="top_p"), InvalidRequestError, False, "top_p must be less"),
        (404, error_body("There is no model 'm'."), InvalidRequestError, False, "no model 'm'"),
        (422, {"detail": [{"loc": ["body"], "msg": "wrong"}]}, InvalidRequestError, False, "wrong"),
        (400, error_body(LONG), PromptTooLongError, False, "maximum context length"),
        (400, error_body("No.", code="context_length_exceeded"), PromptTooLongError, False, "No"),
        (400, error_body("No.", type="exceed_context_size_error"), PromptTooLongError, False, "No"),
        (401, error_body("Wrong key."), EngineError, False, "OPENAI_API_KEY"),
        (403, error_body("Not yours."), EngineError, False, "API key"),
        (429, error_body("Pay.", code="insufficient_quota"), EngineError, False, "Pay"),
        (500, error_body("Broken."), EngineError, False, "Broken"),
        (500, b"<html>Broken</html>", EngineError, False, "Broken"),
        (504, b"", EngineError, True, "504"),
        (409, {"message": "Again."}, EngineError, True, "Again"),
        (502, b"no backend", EngineError, True, "no backend"),
        (503, error_body("Loading."), EngineError, True, "Loading"),
    ],
)
def test_an_error_by_status(
    rude: Callable[..., Rude], status: int, body: Any, kind: type[LMBridgeError], retryable: bool, words: str
) -> None:
    """A view answers 400 for what its client did wrong, and 503 for what may be over in a moment."""
    error = ask(rude(http(status, body)).url)
    assert isinstance(error, kind), repr(error)
    assert isinstance(error, InvalidRequestError) == issubclass(kind, InvalidRequestError)
    assert error.retryable is retryable
    assert words in str(error)


def test_the_field_at_fault_is_named_as_the_caller_knows_it(rude: Callable[..., Rude]) -> None:
    """A caller has written ``stop_words``, and nothing called ``stop``."""
    for there, here in (("stop", "stop_words"), ("messages[0].content", "prompt"), ("top_p", "top_p")):
        error = ask(rude(http(400, error_body(param=there))).url)
        assert isinstance(error, InvalidRequestError)
        assert error.param == here


def test_how_long_a_prompt_may_be_is_told(serve: Callable[..., Far]) -> None:
    """What the far end's engine says of its room comes through two bridges."""
    engine = ScriptedEngine()
    engine.refuse("hello", PromptTooLongError("It has 7 tokens.", "prompt", most=5))
    error = ask(serve(engine).url)
    assert isinstance(error, PromptTooLongError)
    assert error.most == 5


@pytest.mark.parametrize(
    ("more", "kind", "retryable"),
    [
        ({"type": "server_error", "code": "engine_error"}, EngineError, False),
        ({"type": "timeout_error", "code": "deadline_exceeded"}, EngineError, True),
        ({"type": "server_error", "code": "engine_unavailable"}, EngineError, True),
        ({"code": "context_length_exceeded"}, PromptTooLongError, False),
    ],
)
def test_an_error_in_the_midst_of_an_answer(
    rude: Callable[..., Rude], more: Any, kind: type[LMBridgeError], retryable: bool
) -> None:
    """The text so far is kept, and nothing is sent twice behind the caller's back."""
    server = rude(events(chunk("half"), error_body("It broke.", **more)))
    error = ask(server.url)
    assert isinstance(error, kind)
    assert (error.partial, error.retryable) == ("half", retryable)
    assert "It broke" in str(error)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "partial", "words"),
    [
        (events(chunk("half")) + b"data: {", "half", "before the answer was complete"),
        (events(chunk("half"), "{nonsense"), "half", "read"),
        (events(chunk("half"), [1, 2]), "half", "read"),
        (events({"choices": [{"delta": "text"}]}), "", "read"),
        (events({"choices": [{"delta": {}}], "usage": {"prompt_tokens": "many"}}), "", "read"),
        (events(chunk("half"), "[DONE]"), "half", "before the answer was complete"),
    ],
)
def test_nonsense_ends_one_request(rude: Callable[..., Rude], said: bytes, partial: str, words: str) -> None:
    """What was cut or makes no sense is a failure that may be over the next time, and the bridge serves on."""
    server = rude(said, answer("fine"))
    with Bridge(server.url) as bridge:
        with pytest.raises(EngineError, match=words) as caught:
            bridge.infer("hello", timeout=PATIENCE)
        assert caught.value.partial == partial
        assert caught.value.retryable
        until(lambda: not bridge.stats()["servers_away"])  # a server that cuts connections is looked at first
        assert bridge.infer("hello", timeout=PATIENCE).text == "fine"


def test_a_cut_in_the_midst_keeps_the_text(rude: Callable[..., Rude]) -> None:
    """A length that was promised and not kept is a connection that broke."""
    data = f"data: {json.dumps(chunk('half'))}\n\n".encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    server = rude(head + b"%x\r\n%s\r\n" % (len(data), data))
    error = ask(server.url)
    assert isinstance(error, EngineError)
    assert error.retryable
    assert error.partial == "half"
    assert "was lost during the answer" in str(error)


# --- a server that is full ---


def test_a_full_server_is_left_alone_for_as_long_as_it_asks(rude: Callable[..., Rude]) -> None:
    """The request that it refused waits, those behind it are not sent, and all are answered."""
    server = rude(http(429, error_body("Full."), Retry_After="1"), answer("yes"))
    with Bridge(server.url) as bridge:
        first = bridge.submit("first", timeout=PATIENCE)
        until(lambda: server.asked)
        until(lambda: bridge._server_thread.engine._servers[0].held_until)  # type: ignore[union-attr]
        later = bridge.submit("later", timeout=PATIENCE)
        states = {info.id: info.state for info in bridge.requests()}
        assert states[later.request_id] == "waiting"
        assert len(server.asked) == 1
        assert first.result(PATIENCE).text == later.result(PATIENCE).text == "yes"
    assert len(server.asked) == 3


def test_a_server_that_is_full_for_long(rude: Callable[..., Rude]) -> None:
    """Nobody waits for hours without having been told."""
    error = ask(rude(http(429, error_body("Full."), Retry_After="3600")).url)
    assert isinstance(error, QueueFullError)
    assert error.retry_after == 3600


def test_a_server_that_stays_unwell(rude: Callable[..., Rude]) -> None:
    """It is asked again a few times, and then the caller is told."""
    server = rude(http(503, error_body("The engine is down."), Retry_After="0"))
    error = ask(server.url)
    assert error.retryable
    assert "The engine is down" in str(error)
    assert len(server.asked) == errand.MOST_REFUSALS + 1


def test_times_to_wait() -> None:
    """Seconds, a date, or nonsense."""
    assert errors.retry_after({"retry-after": "2.5"}) == 2.5
    assert errors.retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    assert (
        errors.retry_after({"retry-after": "soon"})
        == errors.retry_after({})
        == errors.retry_after({"retry-after": "nan"})
        == errors.retry_after({"retry-after": "Thu, 01 Jan 99999999 00:00:00 GMT"})
        == errors._USUAL_WAIT
    )
    assert errors.retry_after({"retry-after": "1e300"}) == 86400


def test_a_far_end_with_a_queue_that_is_full(serve: Callable[..., Far]) -> None:
    """Its refusals are waited out: a crowd twice as large as it takes is answered, each with its own."""
    far = serve(ScriptedEngine(step_time=0.001, max_batch_size=4), when_full="reject", max_pending=4)
    with Bridge(far.url, max_batch_size=16) as bridge, ThreadPoolExecutor(16) as pool:
        asked = [f"words of number {number}" for number in range(16)]
        assert list(pool.map(lambda prompt: bridge.infer(prompt, timeout=PATIENCE).text, asked)) == asked


def test_a_server_that_does_not_know_what_we_add(rude: Callable[..., Rude]) -> None:
    """Token ids and counts are asked for by the engine itself; a server that refuses is asked without, for good."""
    server = rude(
        http(400, error_body("Unknown.", param="return_token_ids")),
        http(400, error_body("Unknown.", param="stream_options.include_usage")),
        answer("yes"),
    )
    with Bridge(server.url) as bridge:
        assert [bridge.infer("a", timeout=PATIENCE).text for _ in range(2)] == ["yes", "yes"]
    assert [("return_token_ids" in body, "stream_options" in body) for body in server.asked] == [
        (True, True), (False, True), (False, False), (False, False),
    ]  # fmt: skip


# --- who leaves ---


def test_an_abort_reaches_the_far_end_at_once(serve: Callable[..., Far]) -> None:
    """Leaving a stream, a cancel and a deadline each free the far end's engine within a second."""
    far = serve(ScriptedEngine(step_time=0.01))
    long = "word " * 3000
    with Bridge(far.url) as bridge:
        stream = bridge.stream(long, timeout=PATIENCE)
        next(stream)
        stream.close()
        far.engine.wait_for(lambda engine: len(engine.aborted) == 1, 1.0)
        future = bridge.submit(long, timeout=PATIENCE)
        far.engine.wait_for(lambda engine: len(engine.started) == 2)
        future.cancel()
        far.engine.wait_for(lambda engine: len(engine.aborted) == 2, 1.0)
        with pytest.raises(RequestTimeoutError) as caught:
            bridge.infer(long, timeout=0.3)
        far.engine.wait_for(lambda engine: len(engine.aborted) == 3, 1.0)
        assert caught.value.partial.startswith("word ")
        assert not bridge.stats()["servers_away"]  # nobody is to blame for a deadline


def test_an_abort_of_a_request_that_was_not_answered_yet(rude: Callable[..., Rude]) -> None:
    """A prompt that is being read has said nothing, and its socket is closed as well."""
    server = rude(None)
    with Bridge(server.url) as bridge:
        future = bridge.submit("hello", timeout=PATIENCE)
        until(lambda: server.asked)
        future.cancel()
        assert server.gone.wait(1.0)


# --- servers that are away ---


def test_an_old_connection_that_was_closed_costs_nothing(rude: Callable[..., Rude]) -> None:
    """Servers close connections that were idle, just as the next request goes out on one: it is sent again."""
    server = rude(b"", answer("yes"))
    with Bridge(server.url) as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
        assert not bridge.stats()["servers_away"]
    assert len(server.asked) == 2


def test_a_host_that_is_gone_without_a_word_is_noticed(
    rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is told to look after connections that are silent: a host that lost its power closes none."""
    sockets: list[Any] = []
    keep_alive = library._keep_alive

    def seen(connection: Any) -> None:
        keep_alive(connection)
        sockets.append(connection.get_extra_info("socket"))
        assert sockets[-1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    monkeypatch.setattr(library, "_keep_alive", seen)
    with Bridge(rude(answer("yes")).url) as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
    assert sockets


def test_a_start_without_a_server_names_it() -> None:
    """The address and the reason, rather than a first request that fails."""
    port = free_port()
    with pytest.raises(EngineStartError, match=rf"127.0.0.1:{port}.*[Cc]onnect"), Bridge(f"http://127.0.0.1:{port}"):
        pass


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (http(401, error_body("No key.")), {}, "rejected the API key.*No key.*OPENAI_API_KEY"),
        (http(503, error_body("Loading.")), {}, "Loading"),
        (http(404, b"nothing here"), {}, "nothing here"),
        (http(200, b"hello"), {}, "read"),
        (http(200, {"data": []}), {}, "serves no model"),
        (http(200, {"data": [{"id": "a"}, {"id": "b"}]}), {"model_name": "c"}, "'c'.*It serves a, b.*model_name="),
    ],
)
def test_a_start_that_cannot_work_says_why(rude: Callable[..., Rude], models: bytes, options: Any, words: str) -> None:
    """A bridge that is ready has been answered; and a server that answers is not said to be out of reach."""
    with pytest.raises(EngineStartError, match=words) as caught, Bridge(rude(None, models=models).url, **options):
        pass
    assert "reached" not in str(caught.value)
    assert str(caught.value).count("http://") == 1


def test_requests_go_to_the_servers_in_turn(serve: Callable[..., Far]) -> None:
    """Who has the least to do gets the next, and none is left out."""
    ends = [serve(ScriptedEngine()) for _ in range(3)]
    with Bridge(",".join(far.url for far in ends)) as bridge:
        for number in range(9):
            bridge.infer(f"number {number}", timeout=PATIENCE)
        assert bridge.stats()["servers"] == 3
    assert [len(far.engine.started) for far in ends] == [3, 3, 3]


def test_what_has_not_begun_moves_on(serve: Callable[..., Far], rude: Callable[..., Rude]) -> None:
    """A server that went away, is full or unwell costs nobody an answer while another is there."""
    far = serve(ScriptedEngine(), name="m")
    for said in (b"", http(503, b""), http(429, error_body(), Retry_After="60"), events(error_body(code="queue_full"))):
        bad = rude(said)
        with Bridge("m", engine="openai", base_url=[bad.url, far.url], flavour="vllm") as bridge:
            texts = [bridge.infer(f"number {number}", timeout=PATIENCE).text for number in range(4)]
            assert texts == [f"number {number}" for number in range(4)]
        assert bad.asked


def test_what_has_begun_fails_and_the_rest_goes_on(serve: Callable[..., Far], rude: Callable[..., Rude]) -> None:
    """Nothing is generated twice behind the caller's back."""
    bad = rude(events(chunk("half")) + b"data: ")
    far = serve(ScriptedEngine(), name="m")
    with Bridge("m", engine="openai", base_url=[far.url, bad.url], flavour="vllm") as bridge:
        outcomes = [bridge.submit(f"number {number}") for number in range(4)]
        failed = [error for future in outcomes if (error := future.exception(PATIENCE)) is not None]
        assert failed
        assert all(isinstance(error, EngineError) and error.retryable for error in failed)
        assert len(far.engine.started) == 4 - len(failed)


def test_a_server_that_restarts_is_found_again(caplog: pytest.LogCaptureFixture) -> None:
    """The only server reboots: requests fail at once as retryable, the bridge stays ready, and serving resumes."""
    with far_end(ScriptedEngine()) as far, Bridge(far.url) as bridge:
        assert bridge.infer("one", timeout=PATIENCE).text == "one"
        port = int(far.server.url.rpartition(":")[2])
        far.server.close()
        for _ in range(2):
            with pytest.raises(EngineError, match=f"{port}") as caught:
                bridge.infer("two", timeout=PATIENCE)
            assert caught.value.retryable
        assert bridge.state == "ready"
        with far_end(ScriptedEngine(), port=port):
            until(lambda: not bridge.stats()["servers_away"])
            assert bridge.infer("three", timeout=PATIENCE).text == "three"
        assert bridge.health().restarts == 0
    assert [record.message for record in caplog.records if "is back" in record.message]


def test_one_of_two_that_was_down_at_the_start_joins(caplog: pytest.LogCaptureFixture) -> None:
    """A group starts with whoever is there."""
    port = free_port()
    with far_end(ScriptedEngine()) as far, Bridge(f"{far.url}, http://127.0.0.1:{port}") as bridge:
        assert bridge.stats()["servers_away"] == 1
        assert bridge.infer("one", timeout=PATIENCE).text == "one"
        with far_end(ScriptedEngine(), port=port) as other:
            until(lambda: not bridge.stats()["servers_away"])
            for number in range(4):
                bridge.infer(f"number {number}", timeout=PATIENCE)
            assert other.engine.started


def test_a_server_that_hangs_is_found_out(rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing and answers no question fails what it has, without a deadline, and the bridge lives."""
    monkeypatch.setattr(one, "LOOK", 0.05)
    monkeypatch.setattr(one, "SILENCE", 0.2)
    monkeypatch.setattr(library, "ANSWER_TIMEOUT", 0.2)
    server = rude(events(chunk("half")))
    with Bridge(server.url) as bridge:
        future = bridge.submit("hello")
        until(lambda: server.asked)
        server.models = None
        error = future.exception(PATIENCE)
        assert isinstance(error, EngineError)
        assert (error.retryable, error.partial) == (True, "half")
        assert bridge.state == "ready"


def test_a_server_that_is_silent_and_lives_is_waited_for(
    rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt is read without a word: no stall is made of that while the server answers questions."""
    monkeypatch.setattr(one, "LOOK", 0.05)
    monkeypatch.setattr(one, "SILENCE", 0.1)
    server = rude(None)
    with Bridge(server.url, stall_timeout=1.5) as bridge:
        future = bridge.submit("hello")
        engine: Any = bridge._server_thread.engine
        until(lambda: bridge.requests()[0].age > 2.2)
        assert not future.done()
        assert server.url in engine.where()
        assert bridge.health().restarts == 0
        future.cancel()


def test_a_missing_library_names_its_command(rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, and so does one that has changed."""
    monkeypatch.setitem(library.MEMBERS, "openai:AsyncStream", ("fly",))
    with pytest.raises(EngineStartError) as caught, Bridge(rude(None).url):
        pass
    assert isinstance(caught.value.__cause__, MissingDependencyError)
    assert "AsyncStream.fly" in str(caught.value)
    assert "lmbridge[openai]" in str(caught.value)


def test_nothing_is_left_when_it_closes_in_the_midst(rude: Callable[..., Rude]) -> None:
    """Streams are cut, sockets closed and threads ended, whatever the servers do."""
    before = set(threading.enumerate())
    with rude_server(events(chunk("half"))) as server:
        bridge = Bridge(server.url).start(PATIENCE)
        stream = bridge.stream("hello")
        assert next(stream).text == "half"
        bridge.close()
        assert server.gone.wait(PATIENCE)
        until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("lmbridge")])
