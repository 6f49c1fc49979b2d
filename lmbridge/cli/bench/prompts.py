"""Makes prompts for a load from plain words, all different; the same seed makes the same prompts.

Rule: knows no tokenizer. The caller may pass a function that counts tokens, to which the number of words is fitted.
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
FEW, MANY = 8, 72  # words of the two prompts whose tokens are counted


class Prompts:
    """Makes prompts of approximately ``tokens`` tokens.

    Args:
        tokens: per prompt, including what the chat template adds.
        shared: how many tokens at the beginning all prompts share.
        seed: the same seed makes the same prompts.
        count: counts the tokens of a prompt; None: a word counts as a token.
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
        """Make one prompt: a unique number before its own words prevents sharing beyond the prefix."""
        self._made += 1
        return " ".join(part for part in (self._prefix, f"{self._made}:", self._words(words)) if part)

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def _fit(self, count: Callable[[str], int]) -> tuple[float, float]:
        """The tokens that every prompt has besides its words, and the tokens per word."""
        few, many = count(self._make(FEW)), count(self._make(MANY))
        per_word = max(1, many - few) / (MANY - FEW)
        return few - FEW * per_word, per_word
