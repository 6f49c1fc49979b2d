"""Conversations with calls in each form in which real clients send them, in chats and in responses alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests

from lmbridge.messages import Request
from lmbridge.testing import ScriptedEngine
from tests.flask.openai.conftest import PATIENCE, Served

Asks = Callable[..., Request]

USER = {"role": "user", "content": "How is the weather?"}
ARGUMENTS = '{"city": "Rome"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
AS_CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS}
AS_TOLD = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
READ = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOLD]
CHAT_NULLS = (
    "tools", "tool_choice", "parallel_tool_calls", "temperature", "top_p", "stop", "n", "max_tokens",
    "max_completion_tokens", "logprobs", "top_logprobs", "response_format", "seed", "user", "stream", "stream_options",
    "functions", "function_call", "reasoning_effort", "metadata", "store", "modalities", "audio", "prediction",
)  # fmt: skip
NULLS = (
    "background", "conversation", "include", "instructions", "max_output_tokens", "metadata", "parallel_tool_calls",
    "previous_response_id", "prompt", "reasoning", "store", "stream", "stream_options", "temperature", "text",
    "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
)  # fmt: skip


def as_tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def as_flat(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", **function}


@pytest.fixture
def asks(served: Callable[..., Served]) -> Asks:
    """Sends a body, and returns what the engine was asked."""
    asked: list[Request] = []

    def answer(request: Request) -> list[str]:
        asked.append(request)
        return ["Fine."]

    url = served(ScriptedEngine(answer)).url

    def ask(route: str, **body: Any) -> Request:
        response = requests.post(f"{url}/{route}", json=body, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        return asked[-1]

    return ask


@pytest.mark.parametrize("names", [[], ["other"], ["weather", "other"]])
def test_calls_of_functions_that_are_not_there(asks: Asks, names: list[str]) -> None:
    """An agent's last step has no tools any more, and one that was handed over to has others."""
    flat = [{"name": name, "parameters": SCHEMA} for name in names]
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOLD]
    assert asks("chat/completions", messages=history, tools=[as_tool(each) for each in flat]).prompt == READ
    assert asks("responses", input=[USER, AS_CALL, AS_TOLD], tools=[as_flat(each) for each in flat]).prompt == READ


@pytest.mark.parametrize("content", ["absent", None, "", [], [{"type": "text", "text": ""}]])
def test_calls_without_content(asks: Asks, content: Any) -> None:
    """Each client has its own way to say nothing beside a call."""
    said = {"role": "assistant", "tool_calls": [CALL], **({} if content == "absent" else {"content": content})}
    assert asks("chat/completions", messages=[USER, said, TOLD]).prompt == READ


def test_text_beside_calls(asks: Asks) -> None:
    """What the model says before it calls stays with the call, also where it comes as parts."""
    parts = [{"type": "text", "text": "I look."}]
    said = {"role": "assistant", "content": parts, "tool_calls": [CALL]}
    chat = asks("chat/completions", messages=[USER, said, {**TOLD, "content": [{"type": "text", "text": "sunny"}]}])
    item = {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    output = {**AS_TOLD, "output": [{"type": "input_text", "text": "sunny"}]}
    assert chat.prompt == asks("responses", input=[USER, item, AS_CALL, output]).prompt
    assert chat.prompt[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}


@pytest.mark.parametrize("mode", ["required", "named", "allowed"])
def test_a_form_beside_calls_that_must_come(asks: Asks, mode: str) -> None:
    """An agent with an output type gives it with the step that must call, too, and gets its call."""
    form = {"name": "answer", "schema": SCHEMA}
    named = {"type": "function", "name": "weather"}
    nested: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
    flat: Any = {"named": named, "allowed": {"type": "allowed_tools", "mode": "required", "tools": [named]}}
    deep: Any = {
        "named": nested,
        "allowed": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [nested]}},
    }
    for choice, kept in ((mode, False), ("auto", True)):
        of_chat = {"tools": [nested], "response_format": {"type": "json_schema", "json_schema": form}}
        chat = asks("chat/completions", messages=[USER], tool_choice=deep.get(choice, choice), **of_chat)
        of_response = {"tools": [named], "text": {"format": {"type": "json_schema", **form}}}
        response = asks("responses", input="Hi", tool_choice=flat.get(choice, choice), **of_response)
        for config in (chat.config, response.config):
            assert (config.response_format is not None) == kept
            assert config.calling is not None
            assert config.calling.required is not kept


def test_names_of_tool_messages(asks: Asks) -> None:
    """Clients that name the function beside its result are understood; templates may look at the name."""
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {**TOLD, "name": "weather"}]
    assert asks("chat/completions", messages=history).prompt[2] == {**TOLD, "name": "weather"}


def test_nulls_in_messages(asks: Asks) -> None:
    """Whole objects of a client's classes come back with null for what was not set."""
    unset = dict.fromkeys(("name", "refusal", "audio", "function_call", "annotations", "reasoning_content"))
    said = {"role": "assistant", "content": None, "tool_calls": [CALL], **unset}
    answer = {"role": "assistant", "content": "Sunny.", "tool_calls": None, **unset}
    history = [{**USER, "name": None}, said, {**TOLD, "name": None}, answer]
    assert asks("chat/completions", messages=history).prompt == [*READ, {"role": "assistant", "content": "Sunny."}]
    unset = dict.fromkeys(("id", "status", "phase", "namespace", "encrypted_content"))
    part: dict[str, Any] = {
        "type": "output_text",
        "text": "Sunny.",
        "annotations": [],
        "logprobs": None,
        "parsed": None,
    }
    message = {"type": "message", "role": "assistant", "content": [part], **unset}
    thought: dict[str, Any] = {"type": "reasoning", "summary": [], "content": None, **unset}
    call = {**AS_CALL, **unset, "parsed_arguments": {"city": "Rome"}}
    items = [{**USER, "type": None, **unset}, thought, call, {**AS_TOLD, **unset}, message]
    assert asks("responses", input=items).prompt == [*READ, {"role": "assistant", "content": "Sunny."}]


def test_nulls_in_tools(asks: Asks) -> None:
    """What a client leaves null is not shown to the model as such."""
    left = {"description": None, "strict": None, "parameters": None}
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    for about, told in ((left, {}), ({}, {}), ({"description": ""}, {"description": ""})):
        expected = [as_tool({"name": "now", **told, "parameters": empty})]
        given = {"name": "now", **about}
        assert asks("chat/completions", messages=[USER], tools=[as_tool(given)]).config.tools == expected
        assert asks("responses", input="Hi", tools=[as_flat(given)]).config.tools == expected


def test_nulls_everywhere(asks: Asks) -> None:
    """Null is OpenAI's word for what was not given."""
    nothing = asks("chat/completions", messages=[USER]).config
    assert asks("chat/completions", messages=[USER], **dict.fromkeys(CHAT_NULLS)).config == nothing
    nothing = asks("responses", input="Hi").config
    assert asks("responses", input="Hi", **dict.fromkeys(NULLS)).config == nothing
    unset = {"text": {"format": None, "verbosity": None}, "reasoning": {"effort": None, "summary": None}}
    assert asks("responses", input="Hi", **unset).config == nothing
