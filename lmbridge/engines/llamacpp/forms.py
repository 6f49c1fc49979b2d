"""What form an answer must have, in the words of llguidance, which xllamacpp has inside.

Rule: pure functions of plain data. Each grammar is checked here: llama.cpp lets an answer go free whose grammar
llguidance does not understand.
"""

from __future__ import annotations

import json
import re

from lmbridge.engines.schemas import choice_lines, followable
from lmbridge.errors import InvalidRequestError
from lmbridge.grammar import Grammar

_HEAD = "%llguidance {}\n"
_GBNF = "::="
_WRITTEN = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON as Python writes it: small models that may put blanks anywhere put nothing else from then on."""


def grammar_of(form: Grammar) -> str:
    """The form as llama.cpp's ``grammar``; its own notation as it is.

    Raises:
        InvalidRequestError: it is no grammar that can be followed.
    """
    if form.kind == "lark" and _GBNF in form.value:
        return str(form.value)
    text = _lark(form)
    from llguidance import LLMatcher

    try:
        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(text), None)
    except Exception as cause:  # llguidance raises what it likes
        error = str(cause)
    if error:
        brief = " ".join(str(error).partition("<state>")[0].split())[:500]
        raise InvalidRequestError(f"The {form.param} cannot be followed: {brief}", form.param)
    return _HEAD + text


def _lark(form: Grammar) -> str:
    if form.kind == "json":
        schema = followable(form.value, form.param)
        return "start: %json " + json.dumps({**_WRITTEN, **schema} if isinstance(schema, dict) else schema)
    if form.kind == "regex":
        return "start: /" + re.sub(r"\\.|/", _escaped, form.value, flags=re.DOTALL) + "/"
    return "\n".join(choice_lines("start", form.value)) if form.kind == "choice" else str(form.value)


def _escaped(part: re.Match[str]) -> str:
    return r"\/" if part[0] == "/" else part[0]
