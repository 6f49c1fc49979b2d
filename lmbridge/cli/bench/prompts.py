"""Prompts for a load: made of plain words, each different, the same for the same seed.

Rule: knows no tokenizer. Whoever can count a text's tokens hands in the counting, and the number of words is fitted.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
WORDS = _TEXT.split()
FEW, MANY = 8, 72  # words of the two texts whose tokens are counted


class Prompts:
    """Makes prompts of about ``tokens`` tokens.

    Args:
        tokens: of one prompt, what the chat template adds included.
        shared: how many of them are the same at the beginning of every prompt.
        seed: the same seed makes the same prompts.
        count: counts the tokens of a prompt; None takes a word for a token.
    """

    def __init__(self, tokens: int, shared: int, seed: int, count: Callable[[str], int] | None) -> None:
        self._random = random.Random(seed)
        self._made = 0
        self._prefix = ""
        extra, per_word = (0.0, 1.0) if count is None else self._fit(count)
        shared_words = round(max(0.0, shared - extra) / per_word) if shared else 0
        self._own = max(0, round((tokens - extra) / per_word) - shared_words)
        self._prefix = self._words(shared_words)

    def make(self, count: int) -> list[str]:
        """The next ``count`` prompts."""
        return [self._make(self._own) for _ in range(count)]

    def _make(self, words: int) -> str:
        """A number that no other prompt has stands before its own words, so that nothing after it can be shared."""
        self._made += 1
        return " ".join(part for part in (self._prefix, f"{self._made}:", self._words(words)) if part)

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def _fit(self, count: Callable[[str], int]) -> tuple[float, float]:
        """The tokens that every prompt has beside its words, and those of a word."""
        few, many = count(self._make(FEW)), count(self._make(MANY))
        per_word = max(1, many - few) / (MANY - FEW)
        return few - FEW * per_word, per_word
