"""Reads chat messages from OpenAI's clients into a conversation for a chat template.

Rule: pure functions of the client's JSON. Content other than text is refused, not ignored.
"""

from __future__ import annotations

from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.fields import wrong
from lmbridge.messages import Message, ToolCall

ROLES = {  # the client's name: the template's name
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}
_TEXT_KEYS = {"text": "text", "refusal": "refusal"}  # a part's type: the key of its text
_REASONING = ("reasoning", "reasoning_content")  # names that servers use; the latter takes precedence
_INSTEAD = ("tool_calls", "refusal", *_REASONING)  # an assistant's message without content has one of these
_REFUSED = {  # they would change the prompt
    "audio": "it is not supported here",
    "function_call": "send tool_calls instead",
    "prefix": "send continue_final_message instead",
}


def read_messages(messages: Any) -> list[Message]:
    """Read the conversation; each message has a role and a string as its content.

    Raises:
        InvalidRequestError: there are no messages, or one is malformed or contains anything but text.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message.", "messages")
    return [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _read_message(message: Any, path: str) -> Message:
    if not isinstance(message, dict):
        raise wrong(path, "an object with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{path}.role", f"one of {', '.join(ROLES)}", role)
    for key, hint in _REFUSED.items():
        if message.get(key):
            raise wrong(f"{path}.{key}", f"left out ({hint})", message[key])
    name = {} if message.get("name") is None else {"name": message["name"]}
    return {"role": ROLES[role], "content": _content(message, path), **name, **_of_role(role, message, path)}


def _of_role(role: str, message: dict[str, Any], path: str) -> Message:
    """The fields that only messages of that role have."""
    if role == "assistant":
        return _of_assistant(message, path)
    if message.get("tool_calls"):
        raise wrong(f"{path}.tool_calls", "left out (only assistant messages have it)", message["tool_calls"])
    return {"tool_call_id": _text(message, "tool_call_id", path)} if role == "tool" else {}


def _of_assistant(message: dict[str, Any], path: str) -> Message:
    found: Message = {}
    for key in _REASONING:
        if message.get(key):
            found["reasoning_content"] = _text(message, key, path)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise wrong(f"{path}.tool_calls", "a list of calls", calls)
    if calls:
        found["tool_calls"] = [_read_call(call, f"{path}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return found


def _read_call(call: Any, path: str) -> Message:
    if not isinstance(call, dict):
        raise wrong(path, "an object with id and function", call)
    if call.get("type") not in (None, "function"):
        raise wrong(f"{path}.type", '"function"', call["type"])
    function = call.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{path}.function", "an object with name and arguments", function)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise wrong(f"{path}.function.arguments", "a string of JSON", arguments)
    return ToolCall(0, _text(call, "id", path), _text(function, "name", f"{path}.function"), arguments).message()


def _text(holder: dict[str, Any], key: str, path: str) -> str:
    text = holder.get(key)
    if not isinstance(text, str) or not text:
        raise wrong(f"{path}.{key}", "a string that is not empty", text)
    return text


def _content(message: dict[str, Any], path: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and any(message.get(key) for key in _INSTEAD):
        return str(message.get("refusal") or "")
    if not isinstance(content, list):
        raise wrong(f"{path}.content", "a string or a list of text parts", content)
    return "".join([_part_text(part, f"{path}.content[{place}]") for place, part in enumerate(content)])


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_KEYS[kind]) if isinstance(kind, str) and kind in _TEXT_KEYS else None
    if not isinstance(text, str):
        raise wrong(path, 'a text part such as {"type": "text", "text": "…"}; this server reads text only', part)
    return text
