"""Converts the items of ``input`` into a chat's conversation.

Rule: pure functions of the client's JSON. Each item is read as a chat message; the messages of one assistant turn are
then merged, since templates expect its reasoning, text and calls in one message. Unsupported content is refused, not
ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.flask.openai.conversation import read_messages
from lmbridge.flask.openai.fields import wrong
from lmbridge.messages import Message

ROLES = ("user", "assistant", "system", "developer")
KINDS = ("message", "function_call", "function_call_output", "reasoning")
_TEXT_PARTS = ("input_text", "output_text", "text")

Find = Callable[[str], dict[str, Any] | None]
"""Finds an item by its id; None if unknown."""
_Names = dict[str, str]
"""Paths in a chat message, and the corresponding paths in the item."""


def read_input(given: str | list[Any], instructions: str | None, find: Find) -> list[Message]:
    """Read the conversation.

    Args:
        given: the user's message as a string, or at least one item.
        instructions: a system message to put first.
        find: finds the items of references.

    Raises:
        InvalidRequestError: an item is malformed, unknown, or of an unsupported type; ``param`` has its path.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _resolved(given, find)
    messages: list[Message] = []
    for place, item in enumerate(items):
        message = _read_item(item, f"input[{place}]")
        if message is not None:
            _join(messages, message)
    if not messages:
        raise InvalidRequestError("input contains no message; send at least one.", "input")
    if instructions:
        opening = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        said = f"{instructions}\n\n{opening}" if opening else instructions  # many templates accept only one
        messages.insert(0, {"role": "system", "content": said})
    return messages


def _join(messages: list[Message], message: Message) -> None:
    """Append the message, or merge it into the assistant's last one."""
    last = messages[-1] if messages else None
    if last is None or not _is_one_turn(last, message):
        messages.append(message)
        return
    last["content"] = last["content"] or message["content"]
    for name in ("reasoning_content", "tool_calls"):
        if name in message:
            last[name] = last[name] + message[name] if name in last else message[name]


def _is_one_turn(last: Message, message: Message) -> bool:
    return last["role"] == message["role"] == "assistant" and not (last["content"] and message["content"])


# --- references to items ---


def _resolved(items: list[Any], find: Find) -> list[Any]:
    """Replace each reference by its item. Repeated references are refused: a short body must not expand without end."""
    seen: set[str] = set()
    found = []
    for place, item in enumerate(items):
        if _is_reference(item):
            item = _referred(item.get("id"), f"input[{place}]", seen, find)
        found.append(item)
    return found


def _is_reference(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and "role" not in item)


def _referred(item_id: Any, path: str, seen: set[str], find: Find) -> dict[str, Any]:
    if not isinstance(item_id, str):
        raise wrong(f"{path}.id", "the id of an item of an earlier answer", item_id)
    if item_id in seen:
        raise InvalidRequestError(f"{path} refers to {item_id!r} a second time; send it once.", path)
    seen.add(item_id)
    item = find(item_id)
    if item is None:
        raise InvalidRequestError(
            f"{path} refers to {item_id!r}, which is unknown: only the process that gave the answer remembers its "
            "items, for about an hour and for the same API key or address. Send the item itself; a client that sends "
            'references by default sends items if "store" is false.',
            path,
        )
    return item


# --- items to messages ---


def _read_item(item: Any, path: str) -> Message | None:
    """Read one item; None for reasoning without text."""
    if not isinstance(item, dict):
        raise wrong(path, "an object with type, or with role and content", item)
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    if kind not in KINDS:
        raise wrong(f"{path}.type", f"one of {', '.join(KINDS)} (other types are not supported)", kind)
    if kind == "message" and item.get("role") not in ROLES:
        raise wrong(f"{path}.role", f"one of {', '.join(ROLES)}", item.get("role"))
    message, names = _FORMS[kind](item, path)
    if kind == "reasoning" and not message["reasoning_content"]:
        return None
    try:
        return read_messages([message])[0]
    except InvalidRequestError as error:
        raise _renamed(error, {**names, "messages[0]": path}) from None


def _renamed(error: InvalidRequestError, names: _Names) -> InvalidRequestError:
    """The error with the item's own paths."""
    told, param = str(error), error.param or ""
    for theirs, own in names.items():
        told, param = told.replace(theirs, own, 1), param.replace(theirs, own, 1)
    return InvalidRequestError(told, param)


def _message(item: dict[str, Any], path: str) -> tuple[Message, _Names]:
    return {"role": item["role"], "content": _parts(item.get("content"))}, {}


def _call(item: dict[str, Any], path: str) -> tuple[Message, _Names]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    names = {"messages[0].tool_calls[0].function": path, "messages[0].tool_calls[0].id": f"{path}.call_id"}
    calls = [{"id": item.get("call_id"), "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}, names


def _output(item: dict[str, Any], path: str) -> tuple[Message, _Names]:
    names = {"messages[0].tool_call_id": f"{path}.call_id", "messages[0].content": f"{path}.output"}
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _parts(item.get("output"))}, names


def _reasoning(item: dict[str, Any], path: str) -> tuple[Message, _Names]:
    """Read the reasoning's text, else its summary; content encrypted by other servers cannot be read."""
    texts: list[str] = []
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list):
            raise wrong(f"{path}.{name}", "a list of text parts", parts)
        for place, part in enumerate(parts):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                raise wrong(f"{path}.{name}[{place}]", 'a part such as {"type": "reasoning_text", "text": "…"}', part)
            texts.append(text)
        if any(texts):
            break
    return {"role": "assistant", "content": "", "reasoning_content": "\n".join(texts)}, {}


def _parts(content: Any) -> Any:
    """Convert content parts to the form of chats; others stay as they are, to be refused later."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


_FORMS = {"message": _message, "function_call": _call, "function_call_output": _output, "reasoning": _reasoning}
