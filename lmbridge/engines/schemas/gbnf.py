"""Translates grammars in llama.cpp's notation (GBNF) to llguidance's Lark.

Rule: pure functions of plain data. We never use llama.cpp's own reader: it crashes the process on 50,000 brackets, and
hangs for minutes on two hundred optional parts in a row.
"""

from __future__ import annotations

import re

from lmbridge.errors import InvalidRequestError

_MOST_CHARACTERS, _MOST_RULES = 1 << 16, 1_000
"""The translation's time grows with the square of the rules: 0.1 s for a thousand."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_SHORT_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|.)", re.DOTALL)


def lark_of_gbnf(text: str, param: str) -> str:
    """The grammar in Lark.

    Raises:
        InvalidRequestError: it is malformed, or too large.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(text) > _MOST_CHARACTERS or text.count("::=") > _MOST_RULES:
        raise InvalidRequestError(
            f"The {param} is too large: a GBNF grammar may have {_MOST_CHARACTERS:,} characters and {_MOST_RULES:,} "
            f"rules; this one has {len(text):,} and {text.count('::='):,}.",
            param,
        )
    try:
        return _SHORT_ESCAPE.sub(_long, gbnf_to_lark(_ESCAPE.sub(_plain, text)))
    except RecursionError:
        raise InvalidRequestError(f"The {param} is nested too deeply.", param) from None
    except Exception as cause:  # it raises Exception itself
        raise InvalidRequestError(f"The {param} is not supported: {cause}", param) from None


def _plain(escape: re.Match[str]) -> str:
    """A character's number as the character: llguidance's translation drops leading zeros."""
    digits = escape[1] or escape[2]
    if not digits:
        return escape[0]
    code = int(digits, 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    return chr(code) if code <= 0x10FFFF else escape[0]


def _long(escape: re.Match[str]) -> str:
    """An escape valid in both strings and patterns; the llguidance in llama.cpp has no other in strings."""
    return f"\\u00{escape[1]}" if escape[1] else escape[0]
