"""The form an answer must have, read from ``response_format`` (OpenAI's) and ``grammar`` (vLLM's).

Rule: plain data, any thread. The engine decides whether it can follow a grammar.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmbridge.errors import InvalidRequestError
from lmbridge.signatures import is_hint, schema_of
from lmbridge.values import as_list

Kind = Literal["json", "regex", "choice", "lark", "calls"]
_FORMATS = '{"type": "json_schema", "json_schema": {"schema": …}}, {"type": "json_object"} or {"type": "text"}'
_GRAMMARS = '{"json": schema}, {"regex": "…"}, {"choice": ["…", …]}, {"lark": "…"}, or the text of a Lark grammar'
_MOST_CHOICES = 10_000
_SCHEMA_WORDS = {"properties", "$ref", "$defs", "anyOf", "items"}
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)  # never inside a comment or a string


@dataclass(frozen=True)
class Grammar:
    """The form of an answer.

    Attributes:
        kind: ``json``: JSON that fits a schema; ``regex``: a match; ``choice``: one of several strings; ``lark``: a
            sentence of a Lark grammar; ``calls``: the same in llguidance's own Lark, written by an engine.
        value: the schema (a dict or a bool), the expression, the strings, or the grammar.
        param: the field that gave it.
    """

    kind: Kind
    value: Any
    param: str


def read_grammar(response_format: object, grammar: object) -> Grammar | None:
    """The form that these two fields ask for; None if any will do.

    Raises:
        InvalidRequestError: one of them is malformed, or both are given.
    """
    wanted = None if response_format is None else _of_format(response_format)
    if grammar is None:
        return wanted
    if wanted is not None:
        raise InvalidRequestError("response_format and grammar both set the form of the answer: give one.", "grammar")
    return _of_grammar(grammar)


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written in llama.cpp's notation rather than in Lark."""
    return _GBNF_RULE.search(text) is not None


def _of_format(value: object) -> Grammar | None:
    if is_hint(value):
        return _json(value, "response_format")
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and kind not in ("text", "json_object", "json_schema") and _SCHEMA_WORDS & set(value):
        raise InvalidRequestError(
            'Put the schema inside: response_format={"type": "json_schema", "json_schema": {"schema": …}}, or '
            'grammar={"json": …}.',
            "response_format",
        )
    if not isinstance(value, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise _wrong("response_format", _FORMATS, value)
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json", {"type": "object"}, "response_format")
    described = value.get("json_schema")
    if not isinstance(described, Mapping) or "schema" not in described:
        raise _wrong("response_format", _FORMATS, value)
    return _json(described["schema"], "response_format")


def _of_grammar(value: object) -> Grammar:
    if is_hint(value):
        value = {"json": value}
    if isinstance(value, str):
        value = {"lark": value}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise _wrong("grammar", _GRAMMARS, value)
    ((kind, asked),) = value.items()
    if kind == "json":
        return _json(asked, "grammar")
    if kind == "choice":
        texts = as_list(asked)
        if not texts or len(texts) > _MOST_CHOICES or not all(isinstance(text, str) and text for text in texts):
            wanted = f"a list of 1 to {_MOST_CHOICES:,} non-empty strings"
            raise InvalidRequestError(
                f"The choice of a grammar must be {wanted}, not {reprlib.repr(asked)}.", "grammar"
            )
        return Grammar("choice", tuple(texts), "grammar")
    if kind in ("regex", "lark") and isinstance(asked, str) and asked:
        return Grammar(kind, asked, "grammar")
    raise _wrong("grammar", _GRAMMARS, value)


def _json(schema: object, param: str) -> Grammar:
    if is_hint(schema):
        return Grammar("json", schema_of(schema, param), param)
    if isinstance(schema, str):  # as vLLM's clients may send it
        try:
            schema = json.loads(schema)
        except ValueError as cause:
            raise InvalidRequestError(f"The schema in {param} is not valid JSON: {cause}.", param) from None
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidRequestError(f"The schema in {param} must be an object, not {reprlib.repr(schema)}.", param)
    try:
        plain = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidRequestError(f"The schema in {param} cannot be written as JSON: {cause}.", param) from None
    return Grammar("json", plain, param)


def _wrong(param: str, expected: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{param} must be {expected}, not {reprlib.repr(value)}.", param)
