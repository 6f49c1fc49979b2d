"""Tells one prompt from a batch of them, and refuses what is neither.

Rule: pure functions on the caller's thread. ``str``, ``list[dict]`` and ``list[int]`` are one prompt; ``list[str]``,
``list[list[dict]]`` and ``list[list[int]]`` are batches; ``[]`` is the empty batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Prompt


def is_batch(prompts: object) -> bool:
    """Whether ``prompts`` holds prompts rather than being one."""
    if not isinstance(prompts, (list, tuple)):
        return False
    return not prompts or isinstance(prompts[0], (str, list, tuple))


def check_prompt(prompt: Any) -> Prompt:
    """The prompt, copied where it is a list.

    Raises:
        InvalidRequestError: it is empty, or neither a text, a conversation nor token ids.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequestError("The prompt is empty; give it at least one character.", "prompt")
        return prompt
    if not isinstance(prompt, (list, tuple)) or is_batch(prompt):
        raise InvalidRequestError(
            "A prompt is a text, a list of messages such as {'role': 'user', 'content': '…'}, or a list of token ids; "
            f"got {_shape(prompt)}. Only infer and ainfer take a list of prompts.",
            "prompt",
        )
    if isinstance(prompt[0], dict):
        return [_check_message(message, place) for place, message in enumerate(prompt)]
    return [_check_token(token, place) for place, token in enumerate(prompt)]


def _check_message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise InvalidRequestError(
            f"Message {place} of the conversation must be a dict with 'role' and 'content', not {message!r:.80}.",
            "prompt",
        )
    return message.copy()


def _check_token(token: Any, place: int) -> int:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise InvalidRequestError(f"Token {place} of the prompt must be an int >= 0, not {token!r:.80}.", "prompt")
    return token


def _shape(prompt: object) -> str:
    if not isinstance(prompt, (list, tuple)):
        return type(prompt).__name__
    if not prompt:
        return "an empty list"
    return f"a list of {type(cast(Sequence[object], prompt)[0]).__name__}"
