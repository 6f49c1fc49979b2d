"""Chat messages as OpenAI's clients send them, made into a conversation that a chat template takes.

Rule: pure functions of the client's JSON. What is no text is refused rather than left out.
"""

from __future__ import annotations

from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.fields import as_json
from lmbridge.messages import Message

ROLES = {  # as clients say it: as templates know it
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
}
_TEXT_KEYS = {"text": "text", "refusal": "refusal"}  # type of a part: where its text is
_KEPT = ("name", "reasoning_content", "tool_calls", "tool_call_id")  # what a template may look at, too
_REFUSED = {  # would change the prompt
    "audio": "it is not supported here",
    "function_call": "send tool_calls instead",
    "prefix": "send continue_final_message instead",
}


def read_messages(messages: Any) -> list[Message]:
    """The conversation; each message has a role and one text as its content.

    Raises:
        InvalidRequestError: there is none, or one is malformed or holds more than text.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message.", "messages")
    return [_read_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _read_message(message: Any, path: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong(path, "an object with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{path}.role", f"one of {', '.join(ROLES)}", role)
    for key, hint in _REFUSED.items():
        if message.get(key):
            raise _wrong(f"{path}.{key}", f"left out ({hint})", message[key])
    kept = {key: message[key] for key in _KEPT if message.get(key) is not None}
    return {"role": ROLES[role], "content": _content(message, path), **kept}


def _content(message: dict[str, Any], path: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and (message.get("tool_calls") or message.get("refusal")):
        return str(message.get("refusal") or "")
    if not isinstance(content, list):
        raise _wrong(f"{path}.content", "a string or a list of text parts", content)
    return "".join([_part_text(part, f"{path}.content[{place}]") for place, part in enumerate(content)])


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_TEXT_KEYS[kind]) if isinstance(kind, str) and kind in _TEXT_KEYS else None
    if not isinstance(text, str):
        raise _wrong(path, 'a text part such as {"type": "text", "text": "…"}; this server reads text only', part)
    return text


def _wrong(path: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{path} must be {expected}, not {as_json(value)}.", path)
