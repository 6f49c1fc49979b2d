"""Log-probabilities in the two forms OpenAI's clients know: a chat's, and a completion's.

Rule: plain data in, plain data out. Every number is finite, since JSON knows no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from lmbridge.messages import Logprobs

UNLIKELY = -9999.0  # OpenAI's word for a probability of nothing
AT_ONCE = 1000  # tokens: the engine looks them up where it also makes everybody's next ones

AskTexts = Callable[[Sequence[int]], list[str]]


class TokenTexts:
    """Each token's own text, asked of the engine once per answer and token; ``token_id:7`` where it cannot tell.

    Args:
        as_ids: write all tokens like that; ``own`` still tells their texts.
    """

    def __init__(self, ask: AskTexts, as_ids: bool = False) -> None:
        self.as_ids = as_ids
        self._ask = ask
        self._known: dict[int, str] = {}  # "" where the engine cannot tell

    def learn(self, token_ids: Iterable[int]) -> None:
        """Ask for those that are not known yet, as few times as may be."""
        new = list(dict.fromkeys(token for token in token_ids if token not in self._known))
        for start in range(0, len(new), AT_ONCE):
            asked = new[start : start + AT_ONCE]
            texts = self._ask(asked)
            self._known.update(zip(asked, texts, strict=True))

    def joined(self, token_ids: Sequence[int]) -> str:
        """A text of the tokens' texts; of a character that several tokens share, U+FFFD for each."""
        self.learn(token_ids)
        return "".join([self[token] for token in token_ids])

    def own(self, token: int) -> str:
        """A token's text; "" where the engine cannot tell."""
        return self._known[token]

    def __getitem__(self, token: int) -> str:
        """How a token is written."""
        return (not self.as_ids and self._known[token]) or f"token_id:{token}"


class LogprobsForm(Protocol):
    """One of the two forms."""

    def render(self, index: int, entries: Sequence[Logprobs], first: int | None = None) -> dict[str, Any]:
        """One answer's next places.

        Args:
            index: the answer's.
            entries: one for each place.
            first: a token that goes before them, of whose probability nothing is known.
        """
        ...


class ChatLogprobs:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}``.

    Args:
        top: how many of the likeliest tokens each place lists.
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
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, lists of one entry per place.

    Tokens written as ids are followed by ``token_texts``, which says what each of them stands for.

    Args:
        answers: how many there are.
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
    """None for a token whose text is not known, or is part of a character, whose bytes it does not show."""
    return list(text.encode()) if text and "\N{REPLACEMENT CHARACTER}" not in text else None
