"""Turns a server's stream into deltas.

Rule: plain JSON in, deltas out; server thread only. Invalid input raises; the reader reports it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmbridge.engines.openai.errors import passing
from lmbridge.engines.openai.flavours import Flavour
from lmbridge.errors import EngineError
from lmbridge.messages import Delta, FinishReason, GenerationConfig, Logprobs, ToolCall, Usage

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_ID = "token_id:"
LAST_WORDS = 5.0
"""Seconds to wait after an answer's end for token counts and the end of the stream."""
ALL_SAID = 1.0
"""Seconds to wait for the end of the stream alone."""
_HALF = re.compile("[\ud800-\udfff]")


class Words:
    """The texts of tokens, and made-up ids for tokens that a server names only by text."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: dict[int, str] = {}

    def id_in(self, place: Mapping[str, Any]) -> int:
        """The id of a token in an answer; if its id stands in for the text, ``bytes`` may hold the text."""
        token, told, spelled = place["token"], place.get("id"), place.get("bytes")
        if isinstance(told, int):
            self._texts[told] = token
            return told
        if token.startswith(_ID) and spelled:
            self.learn({token: bytes(spelled).decode(errors="replace")})
        return self.id_of(token)

    def learn(self, told: Mapping[str, str]) -> None:
        """Learn the texts of tokens named by id."""
        for token, text in told.items():
            if text and text != token:  # vLLM writes the id for tokens that were not chosen
                self._texts[self.id_of(token)] = text

    def id_of(self, token: str) -> int:
        """The token's id: the real one if it is given."""
        if token.startswith(_ID) and token[len(_ID) :].isdecimal():
            return int(token[len(_ID) :])
        found = self._ids.get(token)
        if found is None:
            found = self._ids[token] = len(self._ids)
            self._texts[found] = token
        return found

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of ids seen so far; "" for others."""
        return [self._texts.get(each, "") for each in ids]


class AnswerReader:
    """One answer, from its first chunk to its last.

    Args:
        url: the server's, for messages.

    Attributes:
        has_begun: something was streamed.
        deadline: by the loop's clock: stop waiting then, since the answer is complete.
    """

    def __init__(self, config: GenerationConfig, is_chat: bool, flavour: Flavour, words: Words, url: str) -> None:
        self._config = config
        self._is_chat = is_chat
        self._flavour = flavour
        self._words = words
        self._url = url
        self.has_begun = False
        self.deadline: float | None = None
        self._reason: str | None = None
        self._usage: Usage | None = None
        self._calls: dict[str, int] = {}  # id -> index, of calls that came without an index
        self._has_calls = False
        self._prompt_ids: Sequence[int] | None = None  # until they arrive

    def take(self, chunk: Any) -> Delta | None:
        """What a chunk adds, if anything; ``finish`` returns the end of the answer.

        Raises:
            Exception: the chunk is invalid.
        """
        self.has_begun = True
        if chunk.get("usage"):
            counts = chunk["usage"]
            self._usage = Usage(int(counts["prompt_tokens"]), int(counts.get("completion_tokens") or 0))
        choice = next((each for each in chunk.get("choices") or () if not each.get("index")), None)
        if choice is not None:  # others belong to further answers requested by extra_body
            self._reason = choice.get("finish_reason") or self._reason
        self._set_deadline()
        if choice is None:
            return None
        if self._config.return_prompt_token_ids:
            self._prompt_ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids") or self._prompt_ids
        delta = self._of_chat(choice.get("delta") or {}) if self._is_chat else Delta(_text(choice.get("text")))
        self._add_tokens(delta, choice)
        if not (delta.text or delta.token_ids or delta.reasoning or delta.tool_calls):
            return None
        delta.prompt_token_ids, self._prompt_ids = self._prompt_ids, None
        return delta

    def _set_deadline(self) -> None:
        if self._reason is not None:
            end = asyncio.get_running_loop().time() + (LAST_WORDS if self._usage is None else ALL_SAID)
            self.deadline = min(end, self.deadline or end)

    def finish(self) -> Delta:
        """The last delta.

        Raises:
            EngineError: the answer is not complete.
        """
        if self._reason is None:
            raise passing(f"The server {self._url} ended its stream before the answer was complete. Send it again.")
        reason = _REASONS.get(self._reason)
        if reason is None:
            text = f"The server {self._url} ended the answer early: finish_reason {self._reason!r}."
            raise passing(f"{text} Send it again.") if self._reason in ("abort", "error") else EngineError(text)
        if reason == "stop" and self._has_calls:  # as OpenAI reports a call forced by name
            reason = "tool_calls"
        return Delta(finish_reason=reason, usage=self._usage, prompt_token_ids=self._prompt_ids)

    def _of_chat(self, said: dict[str, Any]) -> Delta:
        calls = [self._call(piece) for piece in said.get("tool_calls") or ()]
        self._has_calls = self._has_calls or bool(calls)
        return Delta(
            _text(said.get("content") or said.get("refusal")),
            reasoning=_text(said.get("reasoning_content") or said.get("reasoning")),
            tool_calls=calls,
        )

    def _call(self, piece: dict[str, Any]) -> ToolCall:
        function = piece.get("function") or {}
        name, key, index = _text(function.get("name")), _text(piece.get("id")), piece.get("index")
        if index is None and (key or name):
            index = self._calls.setdefault(key or f"the {len(self._calls)}.", len(self._calls))
        elif index is None:  # continues the last
            index = max(0, len(self._calls) - 1)
        return ToolCall(int(index), key, name, _text(function.get("arguments")))

    def _add_tokens(self, delta: Delta, choice: dict[str, Any]) -> None:
        told = choice.get("logprobs")
        if told and self._config.logprobs is not None:
            places = _places_of_chat(told, self._words) if "content" in told else _places(told, self._words)
            delta.logprobs = [_entry(*place) for place in places]
            delta.token_ids = [next(iter(entry)) for entry in delta.logprobs]
        elif self._flavour.tells_ids:
            delta.token_ids = [int(token) for token in choice.get("token_ids") or ()]
        ending = choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason"), str)
        if ending and self._flavour.tells_ending and delta.token_ids:
            del delta.token_ids[-1]
            if delta.logprobs:
                del delta.logprobs[-1]


_Place = tuple[int, float, list[tuple[int, float]]]
"""A token, its log-probability, and the most likely ones."""


def _entry(token: int, logprob: float, others: list[tuple[int, float]]) -> Logprobs:
    entry = {token: float(logprob)}
    for other, value in others:
        entry.setdefault(other, float(value))
    return entry


def _places_of_chat(told: dict[str, Any], words: Words) -> Iterator[_Place]:
    """Also the format of llama.cpp's server for completions, which adds token ids."""
    for place in told["content"] or ():
        ids = [(words.id_in(each), each["logprob"]) for each in place.get("top_logprobs") or ()]
        yield words.id_in(place), place["logprob"], ids


def _places(told: dict[str, Any], words: Words) -> Iterator[_Place]:
    tokens = told.get("tokens") or ()
    words.learn(told.get("token_texts") or {})
    others = told.get("top_logprobs") or [None] * len(tokens)
    for token, logprob, beside in zip(tokens, told.get("token_logprobs") or (), others, strict=True):
        yield words.id_of(token), logprob, [(words.id_of(each), value) for each, value in (beside or {}).items()]


def _text(told: Any) -> str:
    """Encodable text: JSON may contain unpaired surrogates."""
    text = str(told or "")
    return text if text.isascii() else _HALF.sub("\ufffd", text)
