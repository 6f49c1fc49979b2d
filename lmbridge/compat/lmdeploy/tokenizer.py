"""LMDeploy's Tokenizer, over the one of transformers.

Rule: any thread; transformers is imported when one is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmbridge.engines.models import find_model
from lmbridge.errors import MissingDependencyError, UnsupportedOptionError

_MOST_WITH_WORD = 256  # if more tokens contain a word, only the word's own token counts


class Tokenizer:
    """A model's tokenizer.

    Args:
        model_path: ``"demo"``, a folder, or a hub id.

    Attributes:
        model: the tokenizer of transformers.
    """

    def __init__(self, model_path: str, trust_remote_code: bool = False) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as cause:
            raise MissingDependencyError(
                f"A Tokenizer needs transformers ({cause}); install it with: pip install transformers"
            ) from cause
        self.model: Any = AutoTokenizer.from_pretrained(find_model(model_path), trust_remote_code=trust_remote_code)
        self._texts: list[str] = []  # of all tokens; filled on the first word lookup

    @property
    def vocab_size(self) -> int:
        return int(self.model.vocab_size)

    @property
    def bos_token_id(self) -> int | None:
        found: int | None = self.model.bos_token_id
        return found

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self.model.eos_token_id
        return found

    def get_vocab(self) -> dict[str, int]:
        """Each token's name, and its id."""
        return dict(self.model.get_vocab())

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """The text's token ids; ``add_bos=False`` omits the begin-of-sequence token."""
        encoded = list(self.model.encode(s, add_special_tokens=add_special_tokens, **kwargs))
        return encoded[1:] if not add_bos and encoded[:1] == [self.bos_token_id] else encoded

    def decode(self, t: Sequence[int], offset: int | None = None, skip_special_tokens: bool = True) -> str:
        """The text of the token ids from ``offset`` on."""
        return str(self.model.decode(list(t)[offset:], skip_special_tokens=skip_special_tokens))

    def __call__(self, s: str | Sequence[str]) -> Any:
        """The output of transformers' tokenizer, without special tokens."""
        return self.model(s, add_special_tokens=False)

    def indexes_containing_token(self, token: str) -> list[int]:
        """The tokens whose text contains ``token``; none if it takes several tokens."""
        encoded = self.encode(token, add_bos=False, add_special_tokens=False)
        if len(encoded) > 1:
            return []
        if not self._texts:
            self._texts = self.model.batch_decode([[one] for one in range(len(self.model))])
        found = [place for place, text in enumerate(self._texts) if token in text]
        return found if len(found) <= _MOST_WITH_WORD else [i for i in found if self._texts[i] == token]

    def bad_word_ids(self, word: str) -> list[int]:
        """The tokens to ban for a bad word.

        Raises:
            UnsupportedOptionError: the word takes several tokens.
        """
        found = self.indexes_containing_token(word)
        if not found:
            raise UnsupportedOptionError(
                f"bad_words: {word!r} is not a single token of this model, and only single tokens can be banned; leave "
                "it out.",
                param="bad_words",
            )
        return found


def words_of(model: Any, trust: bool) -> Callable[[str], Sequence[int]]:
    """A function that finds a bad word's tokens; loads the model's tokenizer on first use."""
    tokenizer = functools.cache(lambda: Tokenizer(model, trust))

    def word_ids(word: str) -> Sequence[int]:
        if not isinstance(model, (str, Path)):
            raise UnsupportedOptionError("bad_words: the tokenizer of your own engine is unknown.", param="bad_words")
        return tokenizer().bad_word_ids(word)

    return word_ids
