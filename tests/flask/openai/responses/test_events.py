"""Streams: which events come, in which order, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import Bridge, EngineError, Request
from lmbridge.flask.openai.logprobs import ChatLogprobs, TokenTexts
from lmbridge.flask.openai.responses.output import Event, Reasoning, Summary, TextItem, write_event
from lmbridge.flask.openai.responses.reading import read_response
from lmbridge.flask.openai.responses.telling import Telling
from lmbridge.flask.openai.responses.writing import Form
from lmbridge.messages import Delta, GenerationConfig, ToolCall, Usage
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, Served, build_app
from tests.flask.openai.responses.conftest import ANSWERS, Api, nobody_knows
from tests.flask.openai.responses.strict import check_event

Serve = Callable[..., Served]

MESSAGE = ["output_item.added", "content_part.added"]
MESSAGE_END = ["output_text.done", "content_part.done", "output_item.done"]
CALL_END = ["function_call_arguments.done", "output_item.done"]


def endless(request: Request) -> list[str]:
    return ["word "] * 1_000_000


def told(
    deltas: list[Delta], reason: Any = "stop", reasoning: type[TextItem] | None = Reasoning
) -> list[dict[str, Any]]:
    """The events of an answer that comes in these deltas."""
    call = read_response({"input": "Hello"}, frozenset(vars(GenerationConfig())), nobody_knows)
    texts = TokenTexts(lambda ids: [f"<{token}>" for token in ids])
    telling = Telling(Form(call, "scripted"), ChatLogprobs(texts, 1), reasoning)
    events: list[Event] = [*telling.begin()]
    for delta in deltas:
        events += telling.add(delta)
    events += telling.end(reason, Usage(3, 9))
    return [json.loads(write_event(event, place)[1]) for place, event in enumerate(events)]


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    parts: list[dict[str, Any]] = [*item.get("summary", []), *item.get("content", [])]
    assert len(parts) == 1
    return str(parts[0]["text"])


def check(events: list[dict[str, Any]]) -> None:
    """That the events are numbered, of their types, and agree with each other and with what they end with."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        check_event(event)
    assert names(events)[:2] == ["created", "in_progress"]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    done: dict[int, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    added: list[str] = []
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(added)
            added.append(event["item"]["id"])
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == added[event["output_index"]]
            done[event["output_index"]] = event["item"]
        else:
            assert event["item_id"] == added[event["output_index"]]
            assert event.get("content_index", 0) == event.get("summary_index", 0) == 0
            assert event["output_index"] not in done
        if kind.endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    last = events[-1]["response"]
    if last["status"] != "failed":
        assert last["output"] == [done[place] for place in range(len(added))]
    for item in last["output"]:
        assert text_of(item) == texts.get(item["id"], "")


@pytest.mark.parametrize("said", ANSWERS)
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_stream_agrees_with_itself(api: Api, said: str, limit: int | None) -> None:
    """Clients that follow items by their place or their id find each event where it belongs."""
    for reasoning in ({}, {"summary": "auto"}):
        events = api.events(input=said, top_logprobs=1, max_output_tokens=limit, reasoning=reasoning)
        check(events)
        assert names(events)[-1] in (["completed"] if limit is None else ["completed", "incomplete"])


def test_the_order_of_events() -> None:
    """Clients that hold OpenAI's order for the only one work."""
    events = told([
        Delta(reasoning="Hm"), Delta(reasoning="."), Delta("Good"), Delta(" day"),
        Delta(tool_calls=[ToolCall(0, "a", "f", "")]), Delta(tool_calls=[ToolCall(0, arguments="{}")]),
        Delta(tool_calls=[ToolCall(1, "b", "g", "{}")]),
    ], "tool_calls")  # fmt: skip
    assert names(events) == [
        "created", "in_progress",
        *MESSAGE, "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        *MESSAGE, "output_text.delta", "output_text.delta", *MESSAGE_END,
        "output_item.added", "function_call_arguments.delta", *CALL_END,
        "output_item.added", "function_call_arguments.delta", *CALL_END,
        "completed",
    ]  # fmt: skip
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in events[-1]["response"]["output"]] == kinds
    assert [event["item"]["status"] for event in events if "item" in event] == ["in_progress", "completed"] * 4


def test_thoughts_as_a_summary() -> None:
    """Clients that show summaries only, and ask for one, show what the model thinks as it comes."""
    events = told([Delta(reasoning="Hm"), Delta(reasoning="."), Delta("Yes")], reasoning=Summary)
    assert names(events)[2:9] == [
        "output_item.added", "reasoning_summary_part.added",
        "reasoning_summary_text.delta", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
    ]  # fmt: skip
    thought = events[-1]["response"]["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert "content" not in thought


def test_the_rest_of_a_call_comes_before_the_text_after_it() -> None:
    """A slow reader gets both at once, and would be told of a second call without a name."""
    first = Delta(tool_calls=[ToolCall(0, "call_1", "look", '{"city": ')])
    rest = Delta(" So.", tool_calls=[ToolCall(0, arguments='"Rome"}')])
    events = told([first, rest])
    check(events)
    call, message = events[-1]["response"]["output"]
    assert (call["call_id"], call["arguments"]) == ("call_1", '{"city": "Rome"}')
    assert text_of(message) == " So."


def test_text_after_a_call_is_a_message_of_its_own() -> None:
    """Whatever order a model speaks in, each item is told once, and its text is whole."""
    events = told([Delta("a"), Delta(tool_calls=[ToolCall(0, "x", "f", "{}")]), Delta("b"), Delta(reasoning="c")])
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message", "reasoning"]
    assert [item["content"][0]["text"] for item in output if "content" in item] == ["a", "b", "c"]


PIECES = st.one_of(
    st.builds(lambda text: Delta(text, [1]), st.text(max_size=3)),
    st.builds(lambda text: Delta(reasoning=text, token_ids=[1]), st.text(max_size=3)),
    st.builds(lambda said, text: Delta(said, [1, 2], reasoning=text), st.text(max_size=3), st.text(max_size=3)),
    st.builds(lambda text: Delta(token_ids=[1], tool_calls=[ToolCall(0, arguments=text)]), st.text(max_size=3)),
)


def with_calls_begun(deltas: list[Delta]) -> list[Delta]:
    """The same, where pieces of calls that nothing else comes between are those of one call."""
    calls, going_on = 0, False
    for delta in deltas:
        for piece in delta.tool_calls:
            calls += not going_on
            piece.index = calls
            piece.id, piece.name = ("", "") if going_on else (f"call_{calls}", "f")
        going_on = bool(delta.tool_calls) or (going_on and not (delta.text or delta.reasoning))
    return deltas


@given(
    st.lists(PIECES, max_size=8).map(with_calls_begun),
    st.sampled_from(["stop", "length", "tool_calls"]),
    st.sampled_from([Reasoning, Summary]),
)
def test_whatever_a_model_says_is_told(deltas: list[Delta], reason: Any, reasoning: type[TextItem]) -> None:
    """No order of thoughts, texts and calls loses or doubles a word."""
    events = told(deltas, reason, reasoning)
    check(events)
    output = events[-1]["response"]["output"]
    texts = {"message": "", "reasoning": "", "function_call": ""}
    for item in output:
        texts[item["type"]] += text_of(item)
    assert texts["message"] == "".join(delta.text for delta in deltas)
    assert texts["reasoning"] == "".join(delta.reasoning for delta in deltas)
    assert texts["function_call"] == "".join(piece.arguments for delta in deltas for piece in delta.tool_calls)
    assert {item["call_id"] for item in output if "call_id" in item} == {
        piece.id for delta in deltas for piece in delta.tool_calls if piece.id
    }


def test_a_cut_call_is_incomplete() -> None:
    """An agent does not run a function with half of its arguments."""
    last = told([Delta(tool_calls=[ToolCall(0, "x", "f", '{"a')])], "length")[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_log_probabilities_of_a_stream() -> None:
    """Those of the text come with it, also of tokens that are but half a character; those of reasoning do not."""
    events = told([
        Delta(reasoning="Hm", logprobs=[{1: -1.0}]), Delta(logprobs=[{2: -1.0}]),
        Delta("Yes", logprobs=[{3: -0.5, 4: -2.0}]), Delta("", logprobs=[{5: -0.25}]), Delta("!", logprobs=[{6: 0.0}]),
    ])  # fmt: skip
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["<3>"], ["<5>", "<6>"]]
    part = events[-1]["response"]["output"][1]["content"][0]
    assert [entry["bytes"] for entry in part["logprobs"]] == [list(b"<3>"), list(b"<5>"), list(b"<6>")]


def test_tokens_of_reasoning() -> None:
    """They are counted, though nobody is told what they say; of pieces that hold text as well they are a share."""
    deltas = [Delta(reasoning="Hm.", token_ids=[1, 2]), Delta("Yes.", [3, 4], reasoning="abcd"), Delta("So.", [5])]
    for reasoning in (Reasoning, Summary, None):
        response = told(deltas, reasoning=reasoning)[-1]["response"]
        assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


# --- ends ---


def test_a_late_failure_is_an_event(served: Serve) -> None:
    """A stream that has begun says that it failed, how, and what there was until then."""
    frail = served(ScriptedEngine(endless, manual=True))
    body = {"input": "x", "stream": True}
    with requests.post(f"{frail.url}/responses", json=body, stream=True, timeout=PATIENCE) as response:
        lines = response.iter_lines(chunk_size=1)
        begun = [next(lines) for _ in range(2)]
        frail.engine.wait_for(lambda engine: engine.active == 1)
        frail.engine.step()
        frail.engine.fail("x", ValueError("bad luck"))
        frail.engine.step()
        rest = [*begun, *lines]
    events = [json.loads(line.removeprefix(b"data: ")) for line in rest if line.startswith(b"data: ")]
    check(events)
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_an_early_failure_has_a_status(served: Serve) -> None:
    """What fails before the first token is an HTTP error that the client knows by its class, streaming or not."""
    frail = served()
    error = EngineError("The engine has forgotten the request.")
    error.retryable = True
    with frail.client() as client:
        for stream in (False, True):
            frail.engine.refuse("x", error)
            with pytest.raises(openai.InternalServerError) as caught:
                client.responses.create(model="scripted", input="x", stream=stream)
            assert caught.value.status_code == 503


def test_a_deadline(served: Serve) -> None:
    """A request that takes too long is ended, and so is its work."""
    slow = served(ScriptedEngine(manual=True))
    for stream in (False, True):
        body = {"input": "x", "stream": stream, "timeout": 0.1}
        assert requests.post(f"{slow.url}/responses", json=body, timeout=PATIENCE).status_code == 504
    slow.engine.wait_for(lambda engine: engine.active == 0)


def test_a_deadline_later(served: Serve) -> None:
    """A deadline that passes in the middle of a stream is told in the stream."""
    slow = served(ScriptedEngine(endless, manual=True))
    body = {"input": "x", "stream": True, "timeout": 0.6}
    response = requests.post(f"{slow.url}/responses", json=body, timeout=PATIENCE)
    assert response.status_code == 200
    last = json.loads(response.text.strip().split("\n")[-1].removeprefix("data: "))
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")


def test_an_abort(served: Serve) -> None:
    """What an operator aborts does not look complete."""
    cut = served(ScriptedEngine(endless, manual=True))
    body = {"input": "x", "stream": True}
    with requests.post(f"{cut.url}/responses", json=body, stream=True, timeout=PATIENCE) as response:
        lines = response.iter_lines(chunk_size=1)
        assert any(b"response.in_progress" in line for line in lines)
        cut.bridge.abort(cut.engine.started[0])
        last = [line for line in lines if line.startswith(b"data: ")][-1]
    assert json.loads(last.removeprefix(b"data: "))["type"] == "response.failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(served: Serve, stream: bool) -> None:
    """Nobody waits for the answer any more, so the engine stops."""
    left = served(ScriptedEngine(endless, manual=True))
    body = {"input": "x", "stream": stream}
    with pytest.raises(requests.RequestException):
        response = requests.post(f"{left.url}/responses", json=body, timeout=0.5, stream=True)
        list(response.iter_lines(chunk_size=1))
    left.engine.wait_for(lambda engine: len(engine.aborted) == 1 and engine.active == 0, PATIENCE)


def test_a_silent_stream_is_kept_alive(served: Serve) -> None:
    """Proxies that cut silent connections see comments, which clients skip."""
    silent = served(ScriptedEngine(manual=True), heartbeat=0.05)
    body = {"input": "x", "stream": True}
    with requests.post(f"{silent.url}/responses", json=body, stream=True, timeout=PATIENCE) as response:
        lines = response.iter_lines(chunk_size=1)
        assert any(line == b": ping" for line in lines)
        silent.engine.step()
        assert any(b"response.completed" in line for line in lines)


def test_keys_and_limits_are_those_of_the_other_routes() -> None:
    """Nobody gets in by the newer route."""
    with Bridge(ScriptedEngine()) as bridge:
        client = build_app({"scripted": bridge}, api_keys=["k"], max_request_bytes=60).test_client()
        assert client.post("/v1/responses", json={"input": "x"}).status_code == 401
        assert client.get("/v1/responses/resp_1").status_code == 401
        key = {"Authorization": "Bearer k"}
        assert client.post("/v1/responses/", json={"input": "x"}, headers=key).status_code == 200
        assert client.post("/v1/responses", json={"input": "x" * 60}, headers=key).status_code == 413
        assert client.get("/v1/responses", headers=key).status_code == 405
        assert "use /v1/responses instead" in client.post("/responses", json={}).text
