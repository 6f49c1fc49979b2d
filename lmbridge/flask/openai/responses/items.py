"""The items of ``input`` made into the conversation that a chat is.

Rule: pure functions of the client's JSON. Each item is read as a chat's message; those of one turn of the assistant's
then become one message, since templates know its reasoning, its text and its calls as one. What this server has no use
for is refused rather than left out.
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
"""From an item's id to the item, or to None where it is not known."""
_Names = dict[str, str]
"""Where a chat's message has something: where the item has it."""


def read_input(given: str | list[Any], instructions: str | None, find: Find) -> list[Message]:
    """The conversation.

    Args:
        given: a string that the user says, or at least one item.
        instructions: what the system says first.
        find: for items that are only referred to.

    Raises:
        InvalidRequestError: an item is malformed, not known, or of a kind that is not served; ``param`` has its path.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _resolved(given, find)
    messages: list[Message] = []
    for place, item in enumerate(items):
        message = _read_item(item, f"input[{place}]")
        if message is not None:
            _join(messages, message)
    if not messages:
        raise InvalidRequestError("input has nothing that was said: send what the user says.", "input")
    if instructions:
        opening = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        said = f"{instructions}\n\n{opening}" if opening else instructions  # many templates take one such message
        messages.insert(0, {"role": "system", "content": said})
    return messages


def _join(messages: list[Message], message: Message) -> None:
    """Append the message, or have the assistant's last one say it too."""
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


# --- items that are referred to ---


def _resolved(items: list[Any], find: Find) -> list[Any]:
    """The items, each reference replaced by what it refers to. What is short to send must not be long many times."""
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
            f"{path} refers to {item_id!r}, which is not known here: items are remembered by the process that gave the "
            "answer only, for about an hour, and for the same API key or address. Send the item itself. A client that "
            'refers to items by default sends them once its "store" is false.',
            path,
        )
    return item


# --- one item, as a message ---


def _read_item(item: Any, path: str) -> Message | None:
    """None for reasoning of which there is no text."""
    if not isinstance(item, dict):
        raise wrong(path, "an object with type, or with role and content", item)
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    if kind not in KINDS:
        raise wrong(f"{path}.type", f"one of {', '.join(KINDS)} (no others are supported here)", kind)
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
    """The error with the item's own names for its parts."""
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
    """The text of it, else its summary; what was encrypted by others cannot be read here."""
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
    """The content with parts as chats have them; what is none stays as it is, to be refused."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


_FORMS = {"message": _message, "function_call": _call, "function_call_output": _output, "reasoning": _reasoning}
