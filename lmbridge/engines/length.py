"""A lower bound for a text's tokens, from its length alone.

Rule: pure functions of a text or of a tokenizer of ``tokenizers``. ``length_bound`` scans the whole vocabulary
and belongs on the engine's worker thread.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which an added token may swallow (``str.isspace`` has four more)."""
_COMPOSED = 4
"""The most characters that become one in NFC: the longest canonical decomposition of a character (UAX #15)."""
_NORMALIZERS = {
    "NFC": _COMPOSED,
    "NFKC": _COMPOSED,
    **dict.fromkeys(("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"), 1),
}
_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength", "Split", "Punctuation"}
_NEVER_IN_UTF_8 = [0xC0, 0xC1, *range(0xF5, 0x100)]
_Step = dict[str, Any]


@dataclass(frozen=True)
class LengthBound:
    """The most text that one token can stand for.

    Attributes:
        longest: characters of the longest token.
        composed: how many characters of a non-ASCII text may be composed into one before lookup.
        strips: some token swallows adjacent white space, so only the rest counts.
    """

    longest: int
    composed: int = 1
    strips: bool = False

    def fewest_tokens(self, text: str) -> int:
        """The least number of tokens of a text."""
        count = len(text) - _white_space(text) if self.strips else len(text)
        return -(-count // (self.longest if text.isascii() else self.longest * self.composed))


def length_bound(backend: Any) -> LengthBound | None:
    """The bound for ``backend``, a tokenizer of ``tokenizers``; None if there is none.

    There is none if part of a text may vanish: a normaliser deletes it, spaces between words are dropped, or a whole
    unknown word becomes one token. Supported are byte BPE, BPE with byte fallback, and BPE with one token per unknown
    character, if the steps before it keep every character.
    """
    steps = _steps(backend)
    if steps is None or not _covers_every_character(backend.model, steps):
        return None
    factors = [_factor(step) for step in steps]
    added = backend.get_added_tokens_decoder().values()
    stripping = [token for token in added if token.lstrip or token.rstrip]
    if None in factors or any(token.normalized for token in stripping):  # looks for white space after normalising
        return None
    names = [_normalized(backend, token.content) for token in added if token.normalized]
    longest = max(map(len, [*backend.get_vocab(), *names]), default=1)
    return LengthBound(max(1, longest), math.prod(filter(None, factors)), bool(stripping))


def _white_space(text: str) -> int:
    """How many characters of the text are white space."""
    encoded = text.encode("utf-8", "surrogatepass")
    count = len(encoded) - len(encoded.translate(None, WHITE_SPACE[:6].encode()))
    return count if text.isascii() else count + sum(map(text.count, WHITE_SPACE[6:]))


def _steps(backend: Any) -> list[_Step] | None:
    """The steps before the model, as in tokenizer.json; None if one is written in Python."""
    from tokenizers import Tokenizer, models

    shell = Tokenizer(models.BPE())  # without the vocabulary, which would be slow
    try:
        if backend.normalizer is not None:
            shell.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            shell.pre_tokenizer = backend.pre_tokenizer
        layout = json.loads(shell.to_str())
    except Exception:  # tokenizers has no specific exception
        return None
    return _flat(layout["normalizer"], "normalizers") + _flat(layout["pre_tokenizer"], "pretokenizers")


def _flat(step: _Step | None, inner: str) -> list[_Step]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [single for part in step[inner] for single in _flat(part, inner)]


def _factor(step: _Step) -> int | None:
    """How many input characters one output character of the step may stand for; None if some may be dropped."""
    kind = step["type"]
    if kind == "Replace":
        replaced = step["pattern"].get("String", "")
        return 1 if 0 < len(replaced) <= len(step["content"]) else None
    if kind in _PRE_TOKENIZERS:
        return None if step.get("behavior") == "Removed" else 1
    return _NORMALIZERS.get(kind)


def _covers_every_character(model: Any, steps: list[_Step]) -> bool:
    """Whether every character belongs to a token at least as long as the text it covers."""
    from tokenizers import models

    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if model.unk_token is not None and not model.fuse_unk:
        return True
    symbols = _byte_symbols(model, steps)
    return bool(symbols) and all(model.token_to_id(symbol) is not None for symbol in symbols)


def _byte_symbols(model: Any, steps: list[_Step]) -> list[str]:
    """The vocabulary's symbols for the bytes of texts; empty if it is not byte-based."""
    from tokenizers import pre_tokenizers

    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and _PRE_TOKENIZERS.issuperset(kinds[kinds.index("ByteLevel") :]):  # nothing changes them
        return sorted({*pre_tokenizers.ByteLevel.alphabet()} - {chr(byte) for byte in _NEVER_IN_UTF_8})
    return [f"<0x{byte:02X}>" for byte in range(256) if byte not in _NEVER_IN_UTF_8] if model.byte_fallback else []


def _normalized(backend: Any, content: str) -> str:
    normalizer = backend.normalizer
    return content if normalizer is None else str(normalizer.normalize_str(content))
