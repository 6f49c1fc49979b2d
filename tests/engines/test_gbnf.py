"""Grammars in llama.cpp's notation: told from Lark, and translated."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("llguidance")

from lmbridge import InvalidRequestError
from lmbridge.engines.schemas.gbnf import lark_of_gbnf
from lmbridge.grammar import is_gbnf


@pytest.mark.parametrize(
    ("text", "gbnf"),
    [
        ('root ::= "a"', True),
        ('# any\n  root-1\t::= "a"', True),
        ('start: "a ::= b"', False),
        ('// a ::= b\nstart: "c"', False),
        ("start: /a ::= b/", False),
    ],
)
def test_the_notation_is_told_by_the_rules(text: str, gbnf: bool) -> None:
    """A Lark grammar with "::=" in a text or a comment would be read as what it is not."""
    assert is_gbnf(text) is gbnf


def test_numbers_of_characters_are_kept() -> None:
    """llguidance's own translation takes the zeros off them."""
    lark = lark_of_gbnf(r'root ::= "\u00e9\u0041\x42\\u0041" [\U00000061-\U0001F600]', "grammar")
    assert lark.split("start: ")[1].strip() == r'"é\u0041\u0042\\u0041" /[\u0061-😀]/'


@pytest.mark.parametrize(
    "text",
    [
        "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
        "root ::= " + '"a" ' * 20_000,
        "root ::= a\n" + 'a ::= "b"\n' * 1000,
        "root ::= nobody",
        "root ::= <[5]>",
        'root ::= "\\',
    ],
)
def test_what_cannot_be_translated_is_refused_soon(text: str) -> None:
    """The translation would take minutes, with Python's lock held, or raise what is nobody's error."""
    start = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        lark_of_gbnf(text, "grammar")
    assert caught.value.param == "grammar"
    assert time.monotonic() - start < 20
