"""Tells a single prompt from a batch, and refuses anything else.

Rule: pure functions on the caller's thread. The list as a whole decides what it is, so that one invalid item cannot
turn a batch into a prompt:

- a string or a list among its items: a batch of prompts;
- else a message (any mapping) among them: one conversation;
- else a number among them: one prompt's token ids;
- else a batch, empty or of invalid prompts: ``[]``, ``[None]``.

So ``[None, "q"]`` is a batch whose first prompt is invalid, ``[message, None]`` a conversation whose second message is
invalid, and ``[1, None]`` a prompt whose second token is invalid. ``as_list`` decides what counts as a list: tuples,
columns of a data frame and one-dimensional arrays do.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, Literal

from lmbridge.errors import InvalidRequestError, LMBridgeError
from lmbridge.log import shown
from lmbridge.messages import Message, Prompt
from lmbridge.values import as_int, as_list

_Kind = Literal["batch", "conversation", "tokens"]
_USUAL: dict[type, _Kind] = {
    str: "batch", list: "batch", tuple: "batch", dict: "conversation", int: "tokens",
}  # fmt: skip


def is_batch(prompts: object) -> bool:
    """Whether ``prompts`` is a batch rather than one prompt, by the rules in the module's docstring."""
    if isinstance(prompts, str):
        return False
    items = as_list(prompts)
    return items is not None and _kind(items) == "batch"


def check_prompt(prompt: Any) -> Prompt:
    """The prompt in the form engines take: a string, a list of plain dicts, or a list of plain ints.

    Messages are copied, but not their contents.

    Raises:
        InvalidRequestError: it is empty, or neither a string, a conversation nor token ids.
    """
    try:
        return _checked(prompt)
    except LMBridgeError:
        raise
    except Exception as cause:  # raised by a foreign mapping or array
        raise _invalid(f"The prompt cannot be read: {shown(cause)}.") from cause


def _checked(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            raise _invalid("The prompt is empty.")
        return str.__str__(prompt)  # plain: a subclass's methods would run on the server thread
    items = as_list(prompt)
    kind = None if items is None else _kind(items)
    if items is None or kind == "batch":
        raise _invalid(
            "A prompt is a string, a list of messages such as {'role': 'user', 'content': '…'}, or a list of token "
            f"ids; got {_shape(prompt, items)}"
        )
    return _messages(items) if kind == "conversation" else _token_ids(items)


def _kind(items: Sequence[Any]) -> _Kind:
    types = set(map(type, items))
    kinds = {_USUAL.get(kind) or _kind_of(kind) for kind in types}
    if "batch" in kinds:
        return "batch"
    if "conversation" in kinds:
        return "conversation"
    return "tokens" if "tokens" in kinds else "batch"


def _kind_of(item: type) -> _Kind | None:
    """What an item of this type says about its list; None: nothing."""
    if issubclass(item, Mapping):
        return "conversation"
    if issubclass(item, Number):
        return "tokens"
    if issubclass(item, Sequence) or (hasattr(item, "tolist") and hasattr(item, "__len__")):
        return "batch"
    return None


def _messages(items: Sequence[Any]) -> list[Message]:
    return [_message(item, place) for place, item in enumerate(items)]


def _message(message: Any, place: int) -> Message:
    if not isinstance(message, (dict, Mapping)) or not isinstance(message.get("role"), str) or "content" not in message:
        raise _invalid(
            f"Message {place} of the conversation must be a dict with 'role' and 'content', "
            f"not {reprlib.repr(message)}."
        )
    return dict(message)


def _token_ids(items: Sequence[Any]) -> list[int]:
    if set(map(type, items)) == {int} and min(items) >= 0:  # the usual case, about 30 ns a token
        return list(items)
    return [_token_id(item, place) for place, item in enumerate(items)]


def _token_id(token: Any, place: int) -> int:
    plain = as_int(token)
    if plain is None or plain < 0:
        raise _invalid(f"Token {place} of the prompt must be an int >= 0, not {reprlib.repr(token)}.")
    return plain


def _shape(prompt: object, items: Sequence[Any] | None) -> str:
    """What was given instead of a prompt, and how to fix it."""
    name = type(prompt).__name__
    if items:
        return f"a list of {type(items[0]).__name__}. Only infer, ainfer and stream_many take a list of prompts."
    if items is not None:
        return "an empty list. Give at least one message or one token id."
    if isinstance(prompt, Mapping):
        return f"{name}. Put a message into a list: [{{'role': …}}]."
    if hasattr(prompt, "ndim"):
        return f"{name} of {prompt.ndim} dimensions. Give 1 dimension for one prompt, or a list of those for several."
    if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, memoryview)):
        return f"{name}. Make a list of it: list(…)."
    return f"{reprlib.repr(prompt)}."


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, "prompt")
