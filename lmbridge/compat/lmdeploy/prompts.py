"""LMDeploy's forms of prompts: a string, a conversation, a pair of text and images, or a list of these.

Rule: pure functions on the caller's thread; text parts and messages without content follow LMDeploy's rules.
"""

from __future__ import annotations

from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Message

Prompt = str | list[Message]


def is_single(prompts: object) -> bool:
    """Whether the answer to ``prompts`` is one Response rather than a list."""
    if isinstance(prompts, list):
        return bool(prompts) and isinstance(prompts[0], dict)
    return isinstance(prompts, str) or (isinstance(prompts, tuple) and len(prompts) == 2)


def each_prompt(prompts: Any) -> list[Prompt]:
    """The prompts, each a string or a conversation.

    Raises:
        InvalidRequestError: one of them is neither; nothing was sent.
    """
    if is_single(prompts) or not isinstance(prompts, list):
        prompts = [prompts]
    return [_prompt(prompt, place) for place, prompt in enumerate(prompts)]


def as_messages(prompt: Any) -> list[Message]:
    """One prompt of any form as messages of a conversation."""
    [single] = each_prompt(prompt if is_single(prompt) else [prompt])
    return [{"role": "user", "content": single}] if isinstance(single, str) else single


def _prompt(prompt: Any, place: int) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict):
        return [_message(prompt)]
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [_message(message) for message in prompt]
    if isinstance(prompt, tuple) and len(prompt) == 2:
        text_first = _is_text_of(prompt)
        text, images = prompt if text_first else (prompt[1], prompt[0])
        images = images if isinstance(images, list) else [images]
        if isinstance(text, str) and all(map(_is_image, images)):
            said, shown = [{"type": "text", "text": text}], [*map(_image_part, images)]
            return [{"role": "user", "content": [*said, *shown] if text_first else [*shown, *said]}]
    raise InvalidRequestError(
        f"Prompt {place} must be a string, a list of messages such as {{'role': 'user', 'content': '…'}}, or a pair of "
        f"text and image (or images), not {prompt!r:.80}.",
        "prompts",
    )


def _message(message: Message) -> Message:
    """The message with its content; text parts are joined, one line each."""
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return {**message, "content": "\n".join(str(part.get("text", "")) for part in content)}
    return message


def _is_text_of(pair: tuple[Any, Any]) -> bool:
    return isinstance(pair[0], str) and not _is_image(pair[0])


def _is_image(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith(("http", "data:image"))
    return type(value).__module__.partition(".")[0] == "PIL"  # checked without importing it


def _image_part(image: object) -> dict[str, Any]:
    if isinstance(image, str):
        return {"type": "image_url", "image_url": {"url": image}}
    return {"type": "image_data", "image_data": {"data": image}}
