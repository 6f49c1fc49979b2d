"""What the items of an input become, and which are refused where."""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.responses.items import read_input
from tests.flask.openai.responses.conftest import nobody_knows

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "4"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {
    "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": []}],
}  # fmt: skip
AS_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("Hi", [USER]),
        ([USER], [USER]),
        ([{"type": "message", **USER}], [USER]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [{"role": "user", "content": "ab"}],
        ),
        ([{"role": "developer", "content": "x"}, USER], [{"role": "system", "content": "x"}, USER]),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}],
            [{"role": "assistant", "content": "No"}],
        ),
        ([SAID, CALL, OUTPUT], [{"role": "assistant", "content": "Yes", "tool_calls": [AS_CALL]},
                                {"role": "tool", "tool_call_id": "c1", "content": "4"}]),
        ([THOUGHT, SAID], [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}]),
        ([THOUGHT, CALL, {**CALL, "call_id": "c2"}], [
            {"role": "assistant", "content": "", "reasoning_content": "Hm.",
             "tool_calls": [AS_CALL, {**AS_CALL, "id": "c2"}]},
        ]),
        ([THOUGHT, USER], [{"role": "assistant", "content": "", "reasoning_content": "Hm."}, USER]),
        ([SAID, SAID], [{"role": "assistant", "content": "Yes"}] * 2),
        ([CALL, OUTPUT, CALL], [
            {"role": "assistant", "content": "", "tool_calls": [AS_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
            {"role": "assistant", "content": "", "tool_calls": [AS_CALL]},
        ]),
        (
            [{**OUTPUT, "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "tool", "tool_call_id": "c1", "content": "ab"}],
        ),
        (
            [{"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "In short."}]}, SAID],
            [{"role": "assistant", "content": "Yes", "reasoning_content": "In short."}],
        ),
        ([{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "…"}, SAID],
         [{"role": "assistant", "content": "Yes"}]),
        ([{**THOUGHT, "summary": [{"type": "summary_text", "text": "Hm."}]}, SAID],
         [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}]),
        ([{**THOUGHT, "content": None, "summary": [], "encrypted_content": None, "status": None}, USER], [USER]),
        ([USER, {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": ""}]}, SAID],
         [USER, {"role": "assistant", "content": "Yes"}]),
    ],
)  # fmt: skip
def test_items_become_messages(items: Any, expected: list[Any]) -> None:
    """A turn of the assistant's is one message for the template, however many items it was sent in."""
    assert read_input(items, None, nobody_knows) == expected


def test_instructions_go_first() -> None:
    """Templates that take one system message get one."""
    system = {"role": "system", "content": "Be kind."}
    brief = {"role": "system", "content": "Be brief."}

    def read(items: Any, instructions: str = "Be brief.") -> Any:
        return read_input(items, instructions, nobody_knows)

    assert read("Hi") == [brief, USER]
    assert read([system, USER])[0] == {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert read([USER, system]) == [brief, USER, system]
    assert read([system, USER], "") == [system, USER]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("text", "input[1]"),
        ({}, "input[1].type"),
        ({"type": "item_reference", "id": "msg_1"}, "input[1]"),
        ({"id": "msg_1"}, "input[1]"),
        ({"type": "item_reference", "id": 3}, "input[1].id"),
        ({"type": "item_reference"}, "input[1].id"),
        ({"type": "web_search_call", "id": "w"}, "input[1].type"),
        ({"type": ["message"]}, "input[1].type"),
        ({"type": "computer_call_output", "call_id": "c"}, "input[1].type"),
        ({"type": "custom_tool_call", "call_id": "c"}, "input[1].type"),
        ({"type": "message", "role": "tool", "content": "x"}, "input[1].role"),
        ({"type": "message", "content": "x"}, "input[1].role"),
        ({"role": ["user"], "content": "x"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[1].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_file"}]}, "input[1].content[1]"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[1].content[0]"),
        ({**CALL, "arguments": {}}, "input[1].arguments"),
        ({**CALL, "name": None}, "input[1].name"),
        ({**CALL, "call_id": ""}, "input[1].call_id"),
        ({**OUTPUT, "call_id": None}, "input[1].call_id"),
        ({**OUTPUT, "output": 4}, "input[1].output"),
        ({**OUTPUT, "output": [{"type": "input_image"}]}, "input[1].output[0]"),
        ({"type": "reasoning", "content": "x"}, "input[1].content"),
        ({"type": "reasoning", "content": [{"type": "reasoning_text"}]}, "input[1].content[0]"),
    ],
)  # fmt: skip
def test_what_is_refused(item: Any, param: str) -> None:
    """The client hears which of its items is at fault, and where."""
    with pytest.raises(InvalidRequestError) as caught:
        read_input([USER, item], None, nobody_knows)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "contains no message"),
        ({"input": 3}, "input", "a string or a list"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "other tools are not supported"),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]}, "tools[1].type", "mcp"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", r"tools\[0\]\.name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools", r"tools\[0\]\.parameters"),
        ({"tools": [{"type": "function", "name": "f", "strict": 3}]}, "tools[0].strict", "true or false"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", r"tools\[0\]\.name"),
        ({"tool_choice": "required"}, "tools", "give tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "allowed_tools"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
         "tool_choice", "'g'"),
        ({"text": "json"}, "text", "an object"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format", '"name"'),
        ({"text": {"format": {"type": "grammar"}}}, "text.format", "json_schema"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "give one"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "one of none"),
        ({"reasoning": "high"}, "reasoning", "an object"),
        ({"metadata": {"a": 1}}, "metadata", "strings"),
        ({"truncation": "no"}, "truncation", "auto or disabled"),
        ({"include": "x"}, "include", "a list"),
        ({"messages": [USER]}, "messages", "send input"),
        ({"max_tokens": 5}, "max_tokens", "send max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", r"send text\.format"),
        ({"min_tokens": 5, "max_output_tokens": 3}, "min_tokens", "max_output_tokens"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"n": 2}, "n", "one answer"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
    ],
)  # fmt: skip
def test_what_a_request_may_not_hold(client: OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    """A field that cannot be honoured is an error of the client's own class, with its name for the field."""
    with pytest.raises(BadRequestError, match=words) as caught:
        client.post("/responses", cast_to=object, body={"input": "Hello", **fields})
    assert caught.value.param == param
