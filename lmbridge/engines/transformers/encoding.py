"""From a prompt to token ids, with a Hugging Face tokenizer.

Rule: no torch is known here. ``encode`` changes nothing, so that the server thread (short prompts) and the engine's
worker thread (long ones) may both be in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmbridge.errors import InvalidRequestError
from lmbridge.messages import Message, Prompt


class PromptEncoder:
    """Turns texts, conversations and token ids into the ids a model is given."""

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a saved tokenizer may cut texts short or fill them up
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """The token ids of ``prompt``, at least one.

        A text becomes one user message of a chat where the tokenizer has a chat template, unless ``raw``.

        Raises:
            InvalidRequestError: the prompt is of no known kind, has no tokens, is refused by the chat template, or
                holds ids the model does not have.
        """
        if isinstance(prompt, str):
            if raw or not self._tokenizer.chat_template:
                ids = self._tokenize(prompt, add_special_tokens=True)
            else:
                ids = self._chat([{"role": "user", "content": prompt}])
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self._chat([_plain(message) for message in prompt])
        elif isinstance(prompt, Sequence):
            ids = [self._known(token) for token in prompt]
        else:
            raise _wrong(f"A prompt is a text, a list of messages or a list of token ids, not {prompt!r:.80}.")
        if not ids:
            raise _wrong("The prompt is empty: the tokenizer makes no token of it. Give it some text.")
        return ids

    def _chat(self, messages: list[Message]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise _wrong("The model has no chat template, so that it takes no messages; give it a text.")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as cause:  # a template is a program of the model's author, and may raise anything
            raise _wrong(f"The model's chat template refused the messages: {cause}") from cause
        return self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if self._backend is not None:  # the wrapper around it changes settings, and two threads may be here
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except (TypeError, UnicodeError) as cause:  # a text with halves of surrogate pairs
            raise _wrong(f"The prompt is no valid Unicode text: {cause}") from cause

    def _known(self, token: object) -> int:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocabulary_size:
            raise _wrong(f"Token ids of a prompt are ints from 0 to {self._vocabulary_size - 1}, not {token!r:.80}.")
        return token


def characters(prompt: object) -> int:
    """About how many characters there are to tokenise; token ids need no tokenising."""
    if isinstance(prompt, str):
        return len(prompt)
    messages = prompt if isinstance(prompt, (list, tuple)) else ()
    return sum(len(str(message.get("content"))) for message in messages if isinstance(message, dict))


def _plain(message: object) -> Message:
    """The message with its content as one text; parts of it that are texts are joined."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise _wrong(f"A message is a dict with 'role' and 'content', not {message!r:.80}.")
    content = message["content"]
    if isinstance(content, str) or (content is None and len(message) > 2):  # a turn of tool calls has no content
        return dict(message)
    if not isinstance(content, Sequence) or not all(_is_text_part(part) for part in content):
        raise _wrong(f"The content of a message is a text or a list of text parts, not {content!r:.80}.")
    return {**message, "content": "".join(part["text"] for part in content)}


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="prompt")
