"""Servers that leak, bloat, drip, die of a prompt or send elsewhere: what they cannot do to a bridge and callers."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmbridge import Bridge, EngineError, EngineStartError, InvalidRequestError, LMBridgeError, QueueFullError
from lmbridge.engines.openai import errand, errors, group, library, reading
from lmbridge.engines.openai import server as one
from tests.conftest import until
from tests.engines.openai.conftest import MODELS, PATIENCE, Rude, answer, chunk, events, http, rude_server

SECRET = "sk-SECRET"
USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is asked ten times a second, and one that is unwell as often."""
    monkeypatch.setattr(one, "LOOK", 0.1)
    monkeypatch.setattr(errors, "_USUAL_WAIT", 0.1)


def models(name: str = "m", owner: str = "vllm") -> bytes:
    return http(200, {"data": [{"id": name, "owned_by": owner}]})


# --- what nobody may see ---


@pytest.mark.parametrize("key", [f"{SECRET}-é", f"{SECRET}\r\nX-Evil: 1", f"{SECRET}\0"])
def test_a_key_that_no_header_can_hold_is_refused_unshown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """The HTTP library would show it in its error, and that stands in logs."""
    with pytest.raises(InvalidRequestError, match="printable ASCII") as caught:
        Bridge("http://host", api_key=key)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_key_with_a_line_end_is_taken(rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are read from files, which end so."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    server = rude(answer("yes"))
    with Bridge(server.url) as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
    assert f"Bearer {SECRET}\r\n" in server.heads[-1]


@pytest.mark.parametrize("says", [http(401, {"error": {"message": f"Bad: Bearer {SECRET}."}}), events(
    {"error": {"message": f"Bad: {SECRET}", "code": "x"}})])  # fmt: skip
def test_a_key_that_a_server_repeats_is_not_shown(rude: Callable[..., Rude], says: bytes) -> None:
    """Neither in the error nor in what it was raised from."""
    with Bridge(rude(says).url, api_key=SECRET) as bridge, pytest.raises(EngineError, match=r"Bad: .*\*\*\*") as caught:
        bridge.infer("hello", timeout=PATIENCE)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_password_in_a_url_is_sent_and_shown_nowhere(
    rude: Callable[..., Rude], caplog: pytest.LogCaptureFixture
) -> None:
    """``repr``, logs and errors are read by more people than those who may know it."""
    caplog.set_level(logging.DEBUG)
    server = rude(answer("yes"))
    with Bridge(server.url.replace("http://", "http://user:p%2CSECRET@")) as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
        shown = [repr(bridge), bridge.describe()]
    assert "Basic dXNlcjpwLFNFQ1JFVA==" in server.heads[-1]
    for wrong in ("http://user:SECRET@host/v1?x=1", "http://user:SECRET,x@host/v1", "http://user:SECRET@host:99999"):
        with pytest.raises(InvalidRequestError, match="host") as caught:
            Bridge(wrong)
        shown += traceback.format_exception(caught.value)
    assert "SECRET" not in "".join([caplog.text, *shown])


def test_nobody_is_followed_elsewhere(rude: Callable[..., Rude]) -> None:
    """A prompt and a key go to whom they were given, and who sends on is not away for others."""
    other = rude(answer("no"))
    server = rude(http(307, {}, Location=f"{other.url}/chat/completions"), answer("yes"))
    with Bridge(server.url) as bridge:
        with pytest.raises(EngineError, match=f"redirects to {other.url}"):
            bridge.infer("hello", timeout=PATIENCE)
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
    assert not other.asked


# --- what holds everybody up ---


@pytest.mark.parametrize("said", [[chunk("hi"), chunk("", "stop"), USAGE], [chunk("hi"), chunk("", "stop")]])
def test_an_answer_that_is_complete_ends(
    rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    """The server says neither that this was all nor hangs up."""
    monkeypatch.setattr(reading, "LAST_WORDS", 0.4)
    monkeypatch.setattr(reading, "ALL_SAID", 0.2)
    server = rude(events(*said))
    with Bridge(server.url) as bridge:
        response = bridge.infer("hello", timeout=PATIENCE)
        assert (response.text, response.finish_reason) == ("hi", "stop")
        assert server.gone.wait(PATIENCE)


def test_packed_answers_are_not_unpacked(rude: Callable[..., Rude]) -> None:
    """A kilobyte may hold a gigabyte, and the loop is everybody's."""
    bomb = gzip.compress(gzip.compress(b"a" * (1 << 20)))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip, gzip\r\n\r\n"
    server = rude(head + bomb, answer("fine"))
    with Bridge(server.url) as bridge:
        with pytest.raises(EngineError, match="compressed answer"):
            bridge.infer("hello", timeout=PATIENCE)
        assert bridge.infer("hello", timeout=PATIENCE).text == "fine"
    assert "accept-encoding: identity" in server.heads[-1].lower()


def test_a_line_without_an_end_is_not_read(rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a list of models that is as long; many short events are no long one."""
    monkeypatch.setattr(library, "MOST_OF_AN_EVENT", 10_000)
    monkeypatch.setattr(library, "MOST_OF_AN_ANSWER", 10_000)
    server = rude(answer("a" * 300_000), events(*[chunk("ab")] * 500, chunk("", "stop"), "[DONE]"))
    with Bridge(server.url) as bridge:
        with pytest.raises(EngineError, match="oversized answer"):
            bridge.infer("hello", timeout=PATIENCE)
        assert bridge.infer("hello", timeout=PATIENCE).text == "ab" * 500
    with pytest.raises(EngineStartError, match="oversized answer"), Bridge(rude(None, models=models("m" * 20_000)).url):
        pass


def test_a_server_that_drips_holds_up_no_start(rude: Callable[..., Rude], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is there; alone, it is given up after as long as an answer may take."""
    monkeypatch.setattr(group, "LATE", 0.2)
    monkeypatch.setattr(library, "ANSWER_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not stop.wait(0.1):
                    connection.sendall(b" ")

        def drip_on() -> None:
            while not stop.is_set():
                try:
                    drip()
                except OSError:
                    continue

        thread = threading.Thread(target=drip_on)
        thread.start()
        try:
            with Bridge(f"{url},{rude(answer('yes')).url}") as bridge:
                assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
            with pytest.raises(EngineStartError, match=r"within 0\.5 s"), Bridge(url):
                pass
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def test_a_server_that_is_back_is_used_while_another_is_held(rude: Callable[..., Rude]) -> None:
    """A server that is full for long keeps nobody from one that has nothing to do."""
    full = rude(http(429, {"error": {"message": "Full."}}, Retry_After="100"))
    with rude_server(answer("one")) as first:
        port = int(first.url.split(":")[2].partition("/")[0])
        bridge = Bridge(f"{full.url},{first.url}").start(PATIENCE)
        for _ in range(2):
            assert bridge.infer("hello", timeout=PATIENCE).text == "one"
    with bridge:
        waiting = bridge.submit("hello", timeout=PATIENCE)
        until(lambda: bridge.stats()["servers_away"] == 1)
        with rude_server(answer("two"), port=port):
            assert waiting.result(PATIENCE).text == "two"
            assert bridge.infer("hello", timeout=PATIENCE).text == "two"
    assert len(full.asked) == 1


def test_a_moment_of_illness_fails_nobody(rude: Callable[..., Rude]) -> None:
    """One 503 from the only server, and a crowd beside it: it is held for a moment, not given up."""
    server = rude(answer("yes"), http(503, {"error": {"message": "ill"}}), answer("yes"))
    with Bridge(server.url) as bridge, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda number: bridge.infer(f"{number}", timeout=PATIENCE).text, range(40)))
        assert texts == ["yes"] * 40


def test_who_waits_at_a_server_that_speaks_to_others_is_not_forgotten() -> None:
    """A server with one place works on one request at a time, and says nothing to the others until their turn."""
    place = threading.Lock()
    with OneByOne(place) as url, Bridge(url, stall_timeout=1.0, max_batch_size=4) as bridge:
        futures = [bridge.submit(f"number {number}", timeout=PATIENCE) for number in range(2)]
        assert [len(future.result(PATIENCE).text.split()) for future in futures] == [20, 20]
        assert bridge.health().restarts == 0


class OneByOne:
    """A server that streams 20 words in 2 seconds to one client at a time."""

    def __init__(self, place: threading.Lock) -> None:
        self._place = place
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            if not connection.recv(65536).startswith(b"POST"):
                connection.sendall(http(200, MODELS, Connection="close"))
                return
            with self._place:
                connection.sendall(events())
                for _ in range(20):
                    connection.sendall(f"data: {json.dumps(chunk('word '))}\n\n".encode())
                    time.sleep(0.1)  # the pace of the words is what is served here
                connection.sendall(f"data: {json.dumps(chunk('', 'stop'))}\n\ndata: [DONE]\n\n".encode())


# --- what is sent again, and how often ---


def test_a_prompt_that_kills_servers_kills_two_of_them() -> None:
    """A request whose connection broke goes to one more server, and then it is the request that is at fault."""
    with Deadly() as first, Deadly() as second, Deadly() as third:
        with Bridge(",".join(each.url for each in (first, second, third))) as bridge:
            with pytest.raises(EngineError) as caught:
                bridge.infer("die", timeout=PATIENCE)
            assert caught.value.retryable
        assert sorted(each.posts for each in (first, second, third)) == [0, 1, 1]


class Deadly:
    """A server that breaks the connection of each POST once it has read it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.posts = 0

    def __enter__(self) -> Deadly:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    if data.startswith(b"POST"):
                        self.posts += 1
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
                    connection.sendall(http(200, MODELS))


@pytest.mark.parametrize(
    "more", [[], [chunk(role="assistant")], [chunk(role="assistant"), {"error": {"message": "x", "code": "aborted"}}]]
)
def test_what_has_begun_is_not_sent_again(rude: Callable[..., Rude], more: list[Any]) -> None:
    """The response's head, or a first chunk without a word in it, says that the model is at work."""
    data = b"".join(f"data: {json.dumps(each)}\n\n".encode() for each in more)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    bad = [rude(head + (b"%x\r\n%s\r\n" % (len(data), data) if data else b"")) for _ in range(2)]
    with Bridge(",".join(server.url for server in bad)) as bridge, pytest.raises(EngineError) as caught:
        bridge.infer("hello", timeout=PATIENCE)
    assert caught.value.retryable
    assert sum(len(server.asked) for server in bad) == 1


@pytest.mark.parametrize(
    ("said", "most"),
    [
        (http(401, {"error": {"message": "key"}}), 1),
        (http(404, {"error": {"message": "no such route"}}), 1),
        (http(503, {"error": {"message": "ill"}}), errand.MOST_REFUSALS + 1),
        (http(500, {"error": {"message": "broken"}}), 3),
    ],
)
def test_an_ailing_server_is_not_asked_for_each_text(rude: Callable[..., Rude], said: bytes, most: int) -> None:
    """What is wrong with the server is wrong for a whole batch; it is taken apart where one text may be at fault."""
    server = rude(None, said)
    with Bridge(server.url, task="embed") as bridge, ThreadPoolExecutor(32) as pool:
        first = pool.submit(bridge.embed, "first", timeout=1.0)  # the others gather behind it
        until(lambda: server.asked)
        others = [pool.submit(bridge.embed, f"text {number}", timeout=PATIENCE) for number in range(31)]
        assert all(isinstance(future.exception(PATIENCE), LMBridgeError) for future in (first, *others))
    assert len(server.asked) == 1 + most


# --- what makes no sense ---


@pytest.mark.parametrize("vector", ["NaN, 1.0", "1e999, 1.0"])
def test_a_vector_of_no_numbers_fails_alone(rude: Callable[..., Rude], vector: str) -> None:
    """A text far from everything would be stored otherwise."""
    body = f'{{"data": [{{"index": 0, "embedding": [{vector}]}}]}}'.encode()
    with Bridge(rude(http(200, body)).url, task="embed") as bridge, pytest.raises(EngineError, match="NaN"):
        bridge.embed("text", timeout=PATIENCE)


def test_tool_calls_without_an_index(rude: Callable[..., Rude]) -> None:
    """A new id is a new call, and what has none goes on with the last."""
    calls = [
        {"id": "a", "function": {"name": "one", "arguments": '{"x"'}},
        {"function": {"arguments": ": 1}"}},
        {"id": "b", "function": {"name": "two", "arguments": "{}"}},
    ]
    said = events(*(chunk(tool_calls=[each]) for each in calls), chunk("", "tool_calls"), "[DONE]")
    with Bridge(rude(said).url) as bridge:
        made = bridge.infer("hello", timeout=PATIENCE).tool_calls
    assert [(call.id, call.name, call.arguments) for call in made] == [("a", "one", '{"x": 1}'), ("b", "two", "{}")]


def test_second_answers_and_halves_of_characters_stay_out(rude: Callable[..., Rude]) -> None:
    """``extra_body`` may ask for several answers; a lone surrogate could not be encoded by whoever passes it on."""
    other = chunk("other", "stop")
    other["choices"][0]["index"] = 1
    said = events(chunk("a\ud800b"), other, chunk("c"), chunk("", "stop"), "[DONE]")
    with Bridge(rude(said).url, extra_body={"n": 2}) as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "a\ufffdbc"


def test_a_wait_without_end_is_told_in_few_words(rude: Callable[..., Rude]) -> None:
    """Three hundred digits help nobody."""
    server = rude(http(429, {"error": {"message": "Full."}}, Retry_After="1e300"))
    with Bridge(server.url) as bridge, pytest.raises(QueueFullError) as caught:
        bridge.infer("hello", timeout=PATIENCE)
    assert len(str(caught.value)) < 200


# --- groups ---


def test_a_group_is_of_one_kind(rude: Callable[..., Rude], caplog: pytest.LogCaptureFixture) -> None:
    """Fields are chosen by the kind, and another would leave out some without a word; other models are told of."""
    one, other = rude(answer("yes")), rude(answer("yes"), models=models("x", "llamacpp"))
    with pytest.raises(EngineStartError, match=r"of one kind.*'llamacpp'.*'vllm'"), Bridge(f"{one.url},{other.url}"):
        pass
    with Bridge(f"{one.url},{other.url}", flavour="openai") as bridge:
        assert bridge.infer("hello", timeout=PATIENCE).text == "yes"
    assert "several models: m, x" in caplog.text
