"""Items that a client refers to instead of sending them again, as the AI SDK does by default."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from flask import request
from hypothesis import given
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI

from lmbridge import Bridge
from lmbridge.flask.openai.responses.memory import Memory
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, build_app
from tests.flask.openai.responses.conftest import Api, Script

ASKED = {"role": "user", "content": "Weather?"}
THANKS = {"role": "user", "content": "Thanks"}


def refer(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "item_reference", "id": item["id"]}


def said(item_id: str, text: str = "Yes") -> dict[str, Any]:
    return {"id": item_id, "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


# --- over HTTP ---


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", ["Hello", "Think", "Both", "Weather?", "Nothing"])
def test_a_reference_is_as_good_as_the_item(api: Api, asked: str, stream: bool, summary: str | None) -> None:
    """The second turn of a chat, and the second step of a loop, read the first as it was."""
    fields: dict[str, Any] = {"input": asked, "reasoning": {"summary": summary}}
    answer = api.events(**fields)[-1]["response"] if stream else api.post(**fields)
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"}
        for item in answer["output"]
        if item["type"] == "function_call"
    ]
    for items in (answer["output"], [refer(item) for item in answer["output"]]):
        api.post(input=[{"role": "user", "content": asked}, *items, *outputs, THANKS])
    whole, referred = api.script.requests[-2:]
    assert whole.prompt == referred.prompt
    assert len(whole.prompt) > 2


def test_an_unknown_reference(client: OpenAI) -> None:
    """Who refers to what is not known hears for how long it would be, and what to do."""
    words = r"which is unknown.*an hour.*Send the item itself.*\"store\" is false"
    with pytest.raises(BadRequestError, match=words) as caught:
        client.responses.create(model="scripted", input=[{"type": "item_reference", "id": "msg_1"}])
    assert caught.value.param == "input[0]"


def test_nothing_is_remembered_that_must_not_be_stored(api: Api) -> None:
    """``store: false`` is kept to."""
    for fields in ({"store": False}, {"store": False, "stream": True}):
        text = requests.post(f"{api.served.url}/responses", json={"input": "Hello", **fields}, timeout=PATIENCE).text
        item_id = text[text.index('"msg_') + 1 :].partition('"')[0]
        assert "which is unknown" in api.post(input=[refer({"id": item_id})])["error"]["message"]


def test_a_reference_counts_once(api: Api) -> None:
    """A short request cannot have a long item read a million times."""
    item = api.post(input="Hello")["output"][0]
    assert "a second time" in api.post(input=[refer(item), THANKS, refer(item)])["error"]["message"]


def test_an_answer_that_was_left_may_be_referred_to() -> None:
    """Who stops an answer in the middle goes on chatting about its first half."""
    script = Script()
    with Bridge(ScriptedEngine(script)) as bridge:
        client = build_app({"scripted": bridge}).test_client()
        response = client.post("/v1/responses", json={"input": "Hello", "stream": True})
        begun = ""
        for chunk in response.iter_encoded():
            begun += chunk.decode()
            if "output_text.delta" in begun:
                break
        response.close()
        item_id = begun[begun.index('"msg_') + 1 :].partition('"')[0]
        assert client.post("/v1/responses", json={"input": [refer({"id": item_id}), THANKS]}).status_code == 200
        assert script.last.prompt[0]["content"] in ("Good", "Good day")  # type: ignore[index]


def test_accounts_do_not_know_of_each_other() -> None:
    """An id that somebody else got to know opens nothing, with keys, addresses, or accounts of the app's own."""
    with Bridge(ScriptedEngine(Script())) as bridge:
        keyed = build_app({"scripted": bridge}, api_keys=["a", "b"])
        plain = build_app({"scripted": bridge})
        own = build_app({"scripted": bridge})
        own.extensions["lmbridge"].account = lambda _: request.headers["X-Tenant"]
        for app, mine, other in (
            (keyed, {"headers": {"Authorization": "Bearer a"}}, {"headers": {"Authorization": "Bearer b"}}),
            (plain, {}, {"environ_base": {"REMOTE_ADDR": "10.0.0.9"}}),
            (own, {"headers": {"X-Tenant": "a"}}, {"headers": {"X-Tenant": "b"}}),
        ):
            client = app.test_client()
            item = client.post("/v1/responses", json={"input": "Hello"}, **mine).json["output"][0]  # type: ignore
            again = {"json": {"input": [refer(item), THANKS]}}
            assert client.post("/v1/responses", **again, **other).status_code == 400
            assert client.post("/v1/responses", **again, **mine).status_code == 200
        assert plain.test_client().post("/v1/responses", **again).status_code == 400


# --- what is kept, and for how long ---


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_oldest_go_first() -> None:
    """Chats that go on keep what they refer to; what nobody asks for makes room."""
    memory = Memory(most_items=3)
    for name in "abc":
        memory.remember("me", [said(name)])
    assert memory.find("me", "a") == said("a")
    memory.remember("me", [said("d")])
    assert [memory.find("me", name) is not None for name in "abcd"] == [True, False, True, True]


def test_bytes_are_bounded() -> None:
    """A few long answers do not fill a server's memory, and one that is too long of itself is not kept."""
    memory = Memory(most_bytes=1000)
    for place in range(20):
        memory.remember("me", [said(f"m{place}", "x" * 200)])
    assert [place for place in range(20) if memory.find("me", f"m{place}")] == [17, 18, 19]
    memory.remember("me", [said("long", "x" * 2000)])
    assert memory.find("me", "long") is None


def test_time_is_bounded() -> None:
    """What nobody has asked for in an hour is gone, the text of it too."""
    clock = Clock()
    memory = Memory(seconds=60, clock=clock)
    memory.remember("me", [said("a"), said("b")])
    clock.now = 40
    assert memory.find("me", "a")
    clock.now = 80
    assert memory.find("me", "b") is None
    assert memory.find("me", "a")


def test_log_probabilities_are_not_kept() -> None:
    """They would take the place of a hundred answers, and no model reads them."""
    memory = Memory()
    item = said("a")
    item["content"][0]["logprobs"] = [{"token": "Yes"}]
    memory.remember("me", [item])
    assert memory.find("me", "a") == said("a")
    assert item["content"][0]["logprobs"]


@given(st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("abcdef"), st.integers(0, 60), st.booleans())))
def test_bounds_hold_whatever_is_said(steps: list[tuple[str, str, int, bool]]) -> None:
    """No order of saying and referring keeps more than there is room for, or finds what was never said."""
    memory, told = Memory(most_items=4, most_bytes=500), {}
    for account, name, length, say in steps:
        if say:
            told[account, name] = said(name, "x" * length)
            memory.remember(account, [told[account, name]])
        else:
            found = memory.find(account, name)
            assert found is None or found == told[account, name]
        kept = [item for key in told if (item := memory.find(*key))]
        assert len(kept) <= 4
        assert sum(len(json.dumps(item, separators=(",", ":"))) for item in kept) <= 500
