"""The form of an answer for llguidance, which xllamacpp includes.

Rule: plain data. Each grammar is checked here first, and the answer against it as it arrives: llama.cpp silently stops
constraining an answer whose grammar llguidance does not understand, or which exceeds one of llguidance's limits.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lmbridge.engines.schemas import followable
from lmbridge.engines.schemas.gbnf import lark_of_gbnf
from lmbridge.errors import EngineError, InvalidRequestError
from lmbridge.grammar import Grammar, is_gbnf

_HEAD = "%llguidance {}\n"
_WRITTEN = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON as Python writes it: a small model that may put blanks anywhere may never stop."""
_LIMITS: dict[str, Any] = {"max_items_in_row": 20_000, "step_lexer_fuel": 1_000_000}
"""Ten and five times llama.cpp's limits, so that the check here is never the bottleneck."""


class Form:
    """The form of one answer, and a check that the answer keeps it.

    Created on one thread, then used on another.

    Raises:
        InvalidRequestError: the grammar is invalid or not supported.

    Attributes:
        grammar: in llama.cpp's form.
    """

    def __init__(self, form: Grammar) -> None:
        self._param = form.param
        text = _lark(form).removeprefix(_HEAD)
        self.grammar = _HEAD + text
        self._matcher = _matcher(text, form.param)

    def take(self, text: str) -> None:
        """Check the next piece of the answer.

        Raises:
            EngineError: the grammar does not allow it.
        """
        if not self._matcher.consume_tokens(list(text.encode("utf-8", "replace"))):
            raise self._broken()

    def finish(self) -> None:
        """Check that the answer is complete.

        Raises:
            EngineError: it is incomplete.
        """
        if not self._matcher.is_accepting():
            raise self._broken()

    def _broken(self) -> EngineError:
        return EngineError(
            f"The {self._param} of this request cannot be followed on: the answer left it. llama.cpp drops grammars "
            "with more than 2,000 alternatives at one place; write them as one regex, or use fewer."
        )


def _matcher(text: str, param: str) -> Any:
    """llguidance's matcher of the grammar, byte by byte."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    try:
        grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        error = LLMatcher.validate_grammar(grammar, None) or matcher.get_error()
    except Exception as cause:  # llguidance may raise anything
        error = str(cause)
    if error:
        brief = " ".join(str(error).partition("<state>")[0].split())[:500]
        raise InvalidRequestError(f"The {param} cannot be followed: {brief}", param)
    return matcher


def _lark(form: Grammar) -> str:
    if form.kind == "json":
        schema = followable(form.value, form.param)
        return "start: %json " + json.dumps({**_WRITTEN, **schema} if isinstance(schema, dict) else schema)
    if form.kind == "regex":
        return "start: /" + re.sub(r"\\.|/", _escaped, form.value, flags=re.DOTALL) + "/"
    if form.kind == "choice":  # as one regular expression: thousands of strings are too many for a rule
        return "start: /" + "|".join(map(_literal, form.value)) + "/"
    return lark_of_gbnf(form.value, form.param) if is_gbnf(form.value) else str(form.value)


def _escaped(part: re.Match[str]) -> str:
    return r"\/" if part[0] == "/" else part[0]


def _literal(text: str) -> str:
    """A regular expression that matches the text."""
    return re.sub(r"[^0-9A-Za-z]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)
