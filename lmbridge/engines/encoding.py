"""From a prompt to token ids, with a Hugging Face tokenizer.

Rule: no torch is known here. A ``PromptEncoder`` is built on the engine's worker thread, because it scans the whole
vocabulary. Afterwards it is immutable, so the server thread (``at_once``) and the worker thread (``encode``) may use it
together.

The GIL decides what a long prompt costs everyone else. Of a tokenizer's calls, ``encode`` holds it throughout and
``encode_batch_fast`` releases it, so long texts use the latter; the number of tokens is checked before they become a
list. A tokenizer written in Python has no such call: it holds the GIL for long prompts.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmbridge.engines.dialect import Dialect
from lmbridge.engines.dialect.telling import told_by_user
from lmbridge.engines.length import LengthBound, length_bound
from lmbridge.errors import InvalidRequestError, PromptTooLongError
from lmbridge.messages import GenerationConfig, Message, Prompt

INLINE_CHARACTERS = 8_000
"""Prompts of up to this many characters (see ``characters``) are tokenised at once, in a few milliseconds."""
INLINE_IDS = 100_000
"""Up to this many token ids are checked at once, in about four milliseconds."""
RENDERED_CHARACTERS = 5_000_000
"""Up to this many characters, a prompt that probably does not fit is rendered at once, so that it can be refused: about
two milliseconds per million."""
RENDERED_MESSAGES = 256
"""And up to this many messages: about one millisecond."""


_USUAL = GenerationConfig()


class PromptEncoder:
    """Turns strings, conversations and token ids into the ids a model is given.

    Of a request's config it reads the chat template's variables, tools, and ``truncate_prompt_tokens``.

    Args:
        tokenizer: a tokenizer of transformers.
        vocabulary_size: how many rows the model's embeddings have.
        room: the most tokens, prompt and answer together; None for no limit.
        dialect: how tools are described to the model; derived from the tokenizer if omitted.
    """

    def __init__(
        self, tokenizer: Any, vocabulary_size: int, room: int | None = None, dialect: Dialect | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._dialect = Dialect(tokenizer) if dialect is None else dialect
        self._vocabulary_size = vocabulary_size
        self._room: float = math.inf if room is None else room
        self._bound: LengthBound | None = None
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a saved tokenizer may truncate or pad
            self._backend.no_truncation()
            self._backend.no_padding()
            self._bound = length_bound(self._backend)

    def at_once(self, prompt: Prompt, raw: bool = False, config: GenerationConfig = _USUAL) -> list[int] | None:
        """``encode`` if that takes only milliseconds; None if another thread should do it.

        Refuses a prompt that cannot fit, if that can be determined within milliseconds.

        Raises:
            InvalidRequestError, PromptTooLongError: as ``encode``.
        """
        if self._is_short(prompt, config):
            return self.encode(prompt, raw, config)
        if config.truncate_prompt_tokens is not None:
            return None
        if self._bound is not None and self._is_rendered_at_once(prompt, raw, self._bound):
            text = self.text(prompt, raw, config)
            if isinstance(text, str):
                self.refuse_long(text)
        return None

    def encode(self, prompt: Prompt, raw: bool = False, config: GenerationConfig = _USUAL) -> list[int]:
        """The token ids of ``prompt``: at least one, with room for one more.

        A string becomes one user message if the tokenizer has a chat template, unless ``raw``.

        Raises:
            InvalidRequestError: the prompt is of an unknown kind, has no tokens, is refused by the chat template, or
                has ids unknown to the model, whether the caller's or the tokenizer's.
            PromptTooLongError: there is no room for it and one more token. A text that is too long by length alone is
                not tokenised.
        """
        text, most = self.text(prompt, raw, config), config.truncate_prompt_tokens
        if not isinstance(text, str):
            ids = self._given(text if most is None else text[-most:])
        else:
            if most is None:
                self.refuse_long(text)
            ids = self._tokenize(text, self._is_bare(prompt, raw), most)
        if not ids:
            raise _invalid("The prompt is empty: the tokenizer produces no token. Add some text.")
        return ids

    def text(self, prompt: Prompt, raw: bool = False, config: GenerationConfig = _USUAL) -> str | Sequence[Any]:
        """The text to tokenise, with the chat template applied; token ids unchanged.

        Raises:
            InvalidRequestError: the prompt is of an unknown kind, or is refused by the chat template.
        """
        if self._is_bare(prompt, raw):
            self._refuse_variables(config, raw)
            return prompt
        if isinstance(prompt, str):
            return self._chat([{"role": "user", "content": prompt}], config)
        if not isinstance(prompt, Sequence):
            raise _invalid(f"A prompt is a string, a list of messages or a list of token ids, not {_short(prompt)}.")
        if prompt and isinstance(prompt[0], Mapping):
            return self._chat([_plain(message) for message in prompt], config)
        return prompt

    def refuse_long(self, text: str) -> None:
        """Refuse a text that is too long by length alone; milliseconds for millions of characters.

        Raises:
            PromptTooLongError: there is no room for it and one more token.
        """
        if self._bound is None:
            return
        fewest = self._bound.fewest_tokens(text)
        if fewest >= self._room:
            raise self._too_long(f"{len(text)} characters, so at least {fewest} tokens")

    def _refuse_variables(self, config: GenerationConfig, raw: bool) -> None:
        if config.calling is not None and not raw:
            raise InvalidRequestError(
                "The model has no chat template to describe tools; leave them out, or describe them in a raw prompt.",
                param="tools",
            )
        if config.chat_template_kwargs:
            raise InvalidRequestError(
                "chat_template_kwargs need a chat template, which this prompt does not use; leave them out.",
                param="chat_template_kwargs",
            )

    def _is_short(self, prompt: Any, config: GenerationConfig) -> bool:
        if _is_ids(prompt):
            return len(prompt) <= INLINE_IDS or len(prompt) >= self._room
        beside = [part for part in (config.chat_template_kwargs, config.tools) if part]
        return characters([*beside, prompt] if beside else prompt, INLINE_CHARACTERS) <= INLINE_CHARACTERS

    def _is_bare(self, prompt: Prompt, raw: bool) -> bool:
        """Whether it is a string that goes to the model unchanged."""
        return isinstance(prompt, str) and (raw or not self._tokenizer.chat_template)

    def _is_rendered_at_once(self, prompt: Any, raw: bool, bound: LengthBound) -> bool:
        """Whether it renders within milliseconds and is likely to be refused."""
        if self._is_bare(prompt, raw):
            return True
        return bound.longest * self._room <= _rendered_length(prompt) <= RENDERED_CHARACTERS

    def _chat(self, messages: list[Message], config: GenerationConfig) -> str:
        if not self._tokenizer.chat_template:
            raise _invalid("The model has no chat template, so it cannot take messages; give a string.")
        messages = self._dialect.told(messages, config)
        try:
            if config.calling is not None and not self._dialect.knows_tools:
                return self._render_told(messages, config)
            return self._render_calls(messages, config)
        except Exception as cause:  # a template is the model author's program, and may raise anything
            raise _invalid(f"The model's chat template refused the messages: {cause}") from cause

    def _render_told(self, messages: list[Message], config: GenerationConfig) -> str:
        """Render with tools described in the first message, for templates without tools or a system role."""
        try:
            return self._render_calls(messages, config)
        except Exception as first:
            try:
                return self._render_calls(told_by_user(messages), config)
            except Exception:
                raise first from None

    def _render_calls(self, messages: list[Message], config: GenerationConfig) -> str:
        """Most templates take the arguments of a tool call as a mapping; some concatenate them as a string."""
        parsed = [_with_parsed_arguments(message) for message in messages]
        try:
            return self._render(parsed, config)
        except Exception as first:
            if all(new is old for new, old in zip(parsed, messages, strict=True)):
                raise
            try:
                return self._render(messages, config)
            except Exception:
                raise first from None

    def _render(self, messages: list[Message], config: GenerationConfig) -> str:
        going_on, begins = config.continue_final_message, config.add_generation_prompt
        text: str = self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not going_on if begins is None else begins,
            continue_final_message=going_on,
            tokenize=False,
            **{"tools": self._dialect.tools(config), **(config.chat_template_kwargs or {})},
        )
        return text

    def _tokenize(self, text: str, add_special_tokens: bool, most: int | None) -> list[int]:
        try:
            if self._backend is None:
                encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            elif len(text) <= INLINE_CHARACTERS:  # the tokenizer's wrapper is not thread-safe
                encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (TypeError, UnicodeError) as cause:  # unpaired surrogates
            raise _invalid(f"The prompt is not valid Unicode text: {cause}") from cause
        except Exception as cause:  # tokenizers raises nothing more precise
            raise _invalid(f"The model's tokenizer refused the prompt: {cause}") from cause
        count = len(encoded) if most is None else min(len(encoded), most)
        self._refuse_count(count)
        ids = list(encoded if self._backend is None else encoded.ids)[-count:]
        for token in self._unknown(ids):
            raise _invalid(self._missing_row(token))
        return ids

    def _given(self, tokens: Sequence[Any]) -> list[int]:
        self._refuse_count(len(tokens))
        for token in self._unknown(tokens):
            raise _invalid(
                f"Token ids of a prompt are ints from 0 to {self._vocabulary_size - 1}, not {_short(token)}."
            )
        return list(tokens)

    def _unknown(self, tokens: Sequence[Any]) -> Iterable[Any]:
        """Ids unknown to the model. If there are none, this costs about 35 ns a token."""
        if set(map(type, tokens)) <= {int} and (
            not tokens or (min(tokens) >= 0 and max(tokens) < self._vocabulary_size)
        ):
            return ()
        return (token for token in tokens if not self._is_id(token))

    def _is_id(self, token: object) -> bool:
        return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < self._vocabulary_size

    def _missing_row(self, token: Any) -> str:
        """The message about an id that the tokenizer produced."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except Exception:  # it may lack a name for its own id
            name = None
        return (
            f"The tokenizer produces the token {_short(name)} (id {_short(token)}) for a part of the prompt, but the "
            f"model's embeddings end at id {self._vocabulary_size - 1}. Leave that part out. The model's owner can "
            "call resize_token_embeddings on the model or drop the token from the tokenizer."
        )

    def _refuse_count(self, tokens: int) -> None:
        if tokens >= self._room:
            raise self._too_long(f"{tokens} tokens")

    def _too_long(self, size: str) -> PromptTooLongError:
        return PromptTooLongError(
            f"The prompt has {size}; there is room for {self._room}, one of them for the answer. Shorten it.",
            param="prompt",
            most=int(self._room),
        ).hinted("max_context or cache_share raises the limit where the model allows it.")


def characters(prompt: object, enough: float = math.inf) -> int:
    """The approximate amount to render and tokenise, in ASCII characters; 0 for token ids.

    A non-ASCII character counts as three, since it may be as many tokens; a number, as in the arguments of a tool call,
    as one. Counting stops above ``enough``.
    """
    if _is_ids(prompt):
        return 0
    total, rest = 0, [prompt]
    while rest and total <= enough:
        part = rest.pop()
        if isinstance(part, str):
            total += len(part) if part.isascii() else 3 * len(part)
        elif isinstance(part, (Mapping, list, tuple)):
            total += len(part)
            if total <= enough:
                rest.extend(part.values() if isinstance(part, Mapping) else part)
    return total


def _rendered_length(prompt: Any) -> int:
    """The length of a string, or of a few messages made only of strings; else 0."""
    if isinstance(prompt, str):
        return len(prompt)
    if _is_ids(prompt) or len(prompt) > RENDERED_MESSAGES:
        return 0
    parts = [part for message in prompt if isinstance(message, Mapping) for part in message.values()]
    return sum(map(len, parts)) if all(isinstance(part, str) for part in parts) else 0


def _is_ids(prompt: object) -> bool:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return not prompt or not isinstance(prompt[0], Mapping)


# --------------------------------------------------------------------------------------------- messages for a template


def _plain(message: object) -> Message:
    """The message with its content as one string; text parts are joined."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise _invalid(f"A message is a dict with 'role' and 'content', not {_short(message)}.")
    content = message["content"]
    if isinstance(content, str) or (content is None and len(message) > 2):  # a turn of tool calls has no content
        return dict(message)
    if not isinstance(content, Sequence) or not all(_is_text_part(part) for part in content):
        raise _invalid(f"The content of a message is a string or a list of text parts, not {_short(content)}.")
    return {**message, "content": "".join(part["text"] for part in content)}


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _with_parsed_arguments(message: Message) -> Message:
    """The message with tool call arguments parsed from JSON; unchanged if there are none."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    parsed = [_parsed_call(call) for call in calls]
    if all(new is old for new, old in zip(parsed, calls, strict=True)):
        return message
    return {**message, "tool_calls": parsed}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if function is None or not isinstance(arguments, str):
        return call
    try:
        mapping = json.loads(arguments)
    except (ValueError, RecursionError):  # the model may have written anything
        return call
    return {**call, "function": {**function, "arguments": mapping}} if isinstance(mapping, dict) else call


def _short(value: object) -> str:
    return reprlib.repr(value)


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="prompt")
