"""Incremental detokenisation and stop words.

Rule: no torch and no engine is known here; a tokenizer is anything with Hugging Face's ``decode``. One ``Vocabulary``
belongs to an engine, one ``TextStream`` to each answer, and both are used on the server thread only.

The texts a stream returns, joined, are exactly the decoding of all its tokens at once. A naive difference of two
decodings fails for three reasons:

- a token may end inside a character. The decoding then ends in U+FFFD, which is held back until resolved;
- byte tokens (``<0xF0>``) are decoded as a run: one bad byte turns the whole run into U+FFFD, so a run is held back
  until another token ends it;
- the first token of a text is decoded differently (a leading space goes, a word piece loses its space). So each window
  begins with the last token already shown, and tokens without text, which would not count as a first token (skipped
  special ones, ids unknown to the tokenizer), never enter a window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so the most tokens of one character


class Vocabulary:
    """A tokenizer's answers for streams, cached per token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = frozenset(token for token, content in added.items() if content.special)
        self._kinds: dict[int, str] = {}
        self._lengths: dict[tuple[int, bool], int] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ``token_ids`` by themselves."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def kind(self, token_id: int) -> str:
        """``"text"``, ``"byte"``, ``"special"``, or ``"unknown"`` to the tokenizer."""
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._kinds[token_id] = self._classify(token_id)
        return kind

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; "" if unknown to the tokenizer."""
        return [self.decode([token], False) if self.kind(token) != "unknown" else "" for token in token_ids]

    def length(self, token_id: int, skip_special_tokens: bool) -> int:
        """The length of the token's text when it stands alone."""
        key = token_id, skip_special_tokens
        length = self._lengths.get(key)
        if length is None:
            length = self._lengths[key] = len(self.decode([token_id], skip_special_tokens))
        return length

    def _classify(self, token_id: int) -> str:
        if token_id in self._special:
            return "special"
        try:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):  # the model may pad the vocabulary
            token = None
        if token is None:
            return "unknown"
        return "byte" if _BYTE_TOKEN.fullmatch(token) else "text"


class Detokenizer:
    """One answer's tokens to text; the cost per token does not grow with the answer."""

    def __init__(
        self, vocabulary: Vocabulary, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._always = shown
        self._window: list[int] = []  # the last token shown, then those not shown in full
        self._shown = 0  # characters of the window's text already returned

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly ""."""
        kind = self._vocabulary.kind(token_id)
        if kind == "special" and token_id in self._always:
            return self.finish() + self._vocabulary.decode([token_id], False)
        if kind == "unknown" or (kind == "special" and self._skip):
            return ""
        self._window.append(token_id)
        if kind == "byte":
            return ""
        text = self._vocabulary.decode(self._window, self._skip)
        settled = len(text) - text.endswith(_BROKEN)
        new = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        self._slide(settled == len(text), token_id)
        return new

    def finish(self) -> str:
        """The text held back; incomplete characters become U+FFFD."""
        text = self._vocabulary.decode(self._window, self._skip)[self._shown :] if self._window else ""
        self._window, self._shown = [], 0
        return text

    def _slide(self, settled: bool, token_id: int) -> None:
        if settled:
            self._window = [token_id]
            self._shown = self._vocabulary.length(token_id, self._skip)
        elif len(self._window) > 2 * _LONGEST_CHARACTER:  # broken bytes without end
            self._window = self._window[-_LONGEST_CHARACTER:]
            self._shown = len(self._vocabulary.decode(self._window, self._skip)) - 1


class StopWords:
    """Looks for stop words in a text that arrives in pieces.

    Args:
        keep: show the stop word that was found.

    The first complete word wins, so the result does not depend on how the text was cut into pieces; of two that end at
    the same place, the longer one.
    """

    def __init__(self, words: Iterable[str], keep: bool = False) -> None:
        self._words = list(words)
        self._keep = keep
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be shown: without a stop word (unless kept), what may become one, and anything after it."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(word), at) for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            end, start = min(found)
            return text[: end if self._keep else start]
        keep = len(text) - max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text held back that did not become a stop word."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, word: str) -> int:
    """The length of the longest proper prefix of ``word`` that ``text`` ends with."""
    longest = min(len(word) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(word[:size])), 0)


@dataclass(slots=True)
class Piece:
    """What a stream returns at once.

    Attributes:
        text: new text.
        tokens: how many more of the tokens pushed may be shown with it.
        stopped: a stop word was completed; the tokens not shown so far are dropped.
    """

    text: str
    tokens: int
    stopped: bool = False


class TextStream:
    """One answer's text and how many of its tokens belong to it.

    While text is held back because it may become a stop word, so are its tokens. If it does, the tokens shown are those
    with any text before the stop word; the last may include its beginning.

    Args:
        keep_stop_word: the stop word, and the tokens with any of its text, belong to the answer.
        least: look for stop words only after this many tokens.
        shown: special tokens that are never skipped.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop_words: Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        *,
        keep_stop_word: bool = False,
        least: int = 0,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens, shown)
        self._stop_words = StopWords(stop_words, keep_stop_word) if stop_words else None
        self._unscanned = least  # how many more tokens to skip before looking for stop words
        self._starts: list[int] = []  # where the text of each unshown token begins; only with stop words
        self._length = 0  # characters detokenised
        self._shown = 0  # characters returned

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Take tokens; returns what can be shown."""
        if self._stop_words is None:
            return Piece("".join([self._detokenizer.push(token_id) for token_id in token_ids]), len(token_ids))
        text = ""
        for token_id in token_ids:
            self._starts.append(self._length)
            text += self._scan(self._detokenizer.push(token_id), self._stop_words)
            self._unscanned -= 1
            if self._stop_words.stopped:
                break
        return Piece(text, self._release(), self._stop_words.stopped)

    def finish(self) -> Piece:
        """The rest of an answer not yet ended by a stop word; the text held back may still contain one."""
        text = self._detokenizer.finish()
        if self._stop_words is None:
            return Piece(text, 0)
        text = self._scan(text, self._stop_words)
        if self._stop_words.stopped:
            return Piece(text, self._release(), True)
        return Piece(text + self._stop_words.finish(), len(self._starts))

    def _scan(self, text: str, stop_words: StopWords) -> str:
        self._length += len(text)
        if self._unscanned <= 0:
            text = stop_words.push(text)
        self._shown += len(text)
        return text

    def _release(self) -> int:
        count = sum(start < self._shown for start in self._starts)
        del self._starts[:count]
        return count
