"""Writes log-probabilities in the two forms of OpenAI's API: for chats, and for completions.

Rule: plain data in, plain data out. All numbers are finite, as JSON requires.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from lmbridge.messages import Logprobs

UNLIKELY = -9999.0  # OpenAI's value for a probability of zero
AT_ONCE = 1000  # tokens per question: the engine's thread, which also serves all others, looks them up

AskTexts = Callable[[Sequence[int]], list[str]]


class TokenTexts:
    """The text of each token, looked up in the engine once per answer; ``token_id:7`` if the engine has none.

    Args:
        as_ids: write all tokens like that; ``own`` still returns their texts.
    """

    def __init__(self, ask: AskTexts, as_ids: bool = False) -> None:
        self.as_ids = as_ids
        self._ask = ask
        self._known: dict[int, str] = {}  # empty if the engine has none

    def learn(self, token_ids: Iterable[int]) -> None:
        """Look up the unknown ones, in as few questions as possible."""
        new = list(dict.fromkeys(token for token in token_ids if token not in self._known))
        for start in range(0, len(new), AT_ONCE):
            asked = new[start : start + AT_ONCE]
            texts = self._ask(asked)
            self._known.update(zip(asked, texts, strict=True))

    def joined(self, token_ids: Sequence[int]) -> str:
        """The joined texts of the tokens; a character that spans several tokens becomes one U+FFFD per token."""
        self.learn(token_ids)
        return "".join([self[token] for token in token_ids])

    def own(self, token: int) -> str:
        """A token's text; empty if the engine has none."""
        return self._known[token]

    def __getitem__(self, token: int) -> str:
        """The written form of a token."""
        return (not self.as_ids and self._known[token]) or f"token_id:{token}"


class LogprobsForm(Protocol):
    """One of the two forms."""

    def render(self, index: int, entries: Sequence[Logprobs], first: int | None = None) -> dict[str, Any]:
        """Write the log-probabilities of an answer's next tokens.

        Args:
            index: the answer's index.
            entries: one per token.
            first: a token before them, whose probability is unknown.
        """
        ...


class ChatLogprobs:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}``.

    Args:
        top: how many of the likeliest tokens to list for each token.
    """

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts = texts
        self._top = top

    def render(self, index: int, entries: Sequence[Logprobs], first: int | None = None) -> dict[str, Any]:
        self._texts.learn(token for entry in entries for token in entry)
        return {"content": [self._place(entry) for entry in entries], "refusal": None}

    def _place(self, entry: Logprobs) -> dict[str, Any]:
        chosen = next(iter(entry))
        likeliest = _likeliest(entry)[: self._top]
        return {**self._token(chosen, entry[chosen]), "top_logprobs": [self._token(*item) for item in likeliest]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._texts[token], "logprob": _finite(logprob), "bytes": _bytes(self._texts.own(token))}


class CompletionLogprobs:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, lists with one entry per token.

    If tokens are written as ids, ``token_texts`` has the text of each.

    Args:
        answers: the number of answers.
    """

    def __init__(self, texts: TokenTexts, answers: int) -> None:
        self._texts = texts
        self._offsets = [0] * answers  # per answer, the characters before its next token

    def render(self, index: int, entries: Sequence[Logprobs], first: int | None = None) -> dict[str, Any]:
        before = [] if first is None else [first]
        mentioned = [*before, *(token for entry in entries for token in entry)]
        self._texts.learn(mentioned)
        tokens = [self._texts[token] for token in [*before, *(next(iter(entry)) for entry in entries)]]
        unknown = [None] * len(before)
        texts = self._texts
        legend = {"token_texts": {texts[token]: texts.own(token) for token in mentioned}} if texts.as_ids else {}
        return {
            "tokens": tokens,
            "token_logprobs": [*unknown, *(_finite(next(iter(entry.values()))) for entry in entries)],
            "top_logprobs": [*unknown, *(self._top(entry) for entry in entries)],
            "text_offset": [self._advance(index, token) for token in tokens],
            **legend,
        }

    def _top(self, entry: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in _likeliest(entry):
            top.setdefault(self._texts[token], _finite(logprob))
        return top

    def _advance(self, index: int, token: str) -> int:
        offset = self._offsets[index]
        self._offsets[index] += len(token)
        return offset


def _likeliest(entry: Logprobs) -> list[tuple[int, float]]:
    return sorted(entry.items(), key=lambda item: -_finite(item[1]))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else UNLIKELY


def _bytes(text: str) -> list[int] | None:
    """The bytes of a token's text; None if the text is unknown, or part of a character and its bytes therefore are."""
    return list(text.encode()) if text and "\N{REPLACEMENT CHARACTER}" not in text else None
