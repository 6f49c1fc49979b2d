"""What form an answer must have, in the words of llguidance, which xllamacpp has inside.

Rule: plain data. Each grammar is checked here before, and the answer against it meanwhile: llama.cpp lets an answer go
free whose grammar llguidance does not understand, or which meets one of llguidance's limits on the way.
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
"""JSON as Python writes it: small models that may put blanks anywhere put nothing else from then on."""
_LIMITS: dict[str, Any] = {"max_items_in_row": 20_000, "step_lexer_fuel": 1_000_000}
"""Ten and five times llama.cpp's, so that what is looked at here is the answer."""


class Form:
    """What one answer must be, and whether it is.

    It is made on one thread and then asked on another.

    Raises:
        InvalidRequestError: it is no grammar that can be followed.

    Attributes:
        grammar: as llama.cpp takes it.
    """

    def __init__(self, form: Grammar) -> None:
        self._param = form.param
        text = _lark(form).removeprefix(_HEAD)
        self.grammar = _HEAD + text
        self._matcher = _matcher(text, form.param)

    def take(self, text: str) -> None:
        """The answer goes on with this text.

        Raises:
            EngineError: that is nothing that the grammar allows.
        """
        if not self._matcher.consume_tokens(list(text.encode("utf-8", "replace"))):
            raise self._broken()

    def finish(self) -> None:
        """The answer is whole.

        Raises:
            EngineError: there should have been more of it.
        """
        if not self._matcher.is_accepting():
            raise self._broken()

    def _broken(self) -> EngineError:
        return EngineError(
            f"The {self._param} of this request cannot be followed on: the answer has left it. llama.cpp lets go of a "
            "grammar that has more than 2,000 ways to go on at one place; write alternatives as one regex, or fewer."
        )


def _matcher(text: str, param: str) -> Any:
    """llguidance's matcher of the grammar, byte by byte."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    try:
        grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        error = LLMatcher.validate_grammar(grammar, None) or matcher.get_error()
    except Exception as cause:  # llguidance raises what it likes
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
    if form.kind == "choice":  # as one expression: thousands of texts are too many for a rule
        return "start: /" + "|".join(map(_literal, form.value)) + "/"
    return lark_of_gbnf(form.value, form.param) if is_gbnf(form.value) else str(form.value)


def _escaped(part: re.Match[str]) -> str:
    return r"\/" if part[0] == "/" else part[0]


def _literal(text: str) -> str:
    """The text as an expression that matches it."""
    return re.sub(r"[^0-9A-Za-z]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)
