"""Tools and calls as plain messages, for models whose chat template supports neither.

Rule: pure functions of messages. Calls are written in ``formats.HERMES``, which answers must then follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmbridge.messages import Message
from lmbridge.tools import Tool

_TOLD = """\
You can call functions. Each line in <tools> describes one, with a JSON schema of its parameters.
<tools>
{tools}
</tools>
A call is JSON with the name of the function and its arguments:
<tool_call>
{{"name": "the name", "arguments": {{"the parameter": "its value"}}}}
</tool_call>"""


def told(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation with the tools described in its system message."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _TOLD.format(tools=lines)
    if messages and messages[0]["role"] == "system":
        before = messages[0].get("content") or ""
        return [{**messages[0], "content": f"{before}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def told_by_user(messages: Sequence[Message]) -> list[Message]:
    """For templates without a system role: the system message is put before the first user message."""
    first, *rest = messages
    if first["role"] != "system" or not rest or rest[0]["role"] != "user":
        return list(messages)
    return [{**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def written_out(messages: Sequence[Message]) -> list[Message]:
    """The conversation with calls and results as text; results become user messages."""
    plain: list[Message] = []
    names: dict[str, str] = {}  # of the functions, by the ids of their calls
    for place, message in enumerate(messages):
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
            text = f"The result of {name} is:\n{message.get('content') or ''}"
            if messages[place - 1]["role"] == "tool" and plain:
                text = f"{plain.pop()['content']}\n\n{text}"
            plain.append({"role": "user", "content": text})
        elif isinstance(calls, (list, tuple)) and any(_function(call).get("name") for call in calls):
            names.update((_id(call), _function(call).get("name", "")) for call in calls)
            plain.append(_with_calls(message, calls))
        else:
            plain.append(message)
    return plain


def _with_calls(message: Message, calls: Sequence[Any]) -> Message:
    texts = [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in calls]
    content = message.get("content")
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([*([content] if content else ()), *texts])}


def _call(call: Any) -> str:
    function = _function(call)
    arguments = function.get("arguments", {})
    said = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function.get("name"))}, "arguments": {said}}}'


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def _id(call: Any) -> str:
    return str(call.get("id")) if isinstance(call, Mapping) else ""
