"""The grammar of an answer that must call functions, or may do so instead of another form.

Rule: pure functions of plain data. The grammar is in llguidance's own Lark, with a JSON schema for each function's
arguments; a mark that is a single token appears by its id, because its text would be other tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lmbridge.engines.dialect.formats import Spelled
from lmbridge.engines.schemas import choice_lines, followable
from lmbridge.errors import InvalidRequestError
from lmbridge.grammar import Grammar
from lmbridge.tools import Calling

MOST_CALLS = 16
"""In one answer: a small model that is allowed to continue never stops."""


def calls_grammar(calling: Calling, spelled: Spelled, tokens: Mapping[str, int], other: Grammar | None) -> Grammar:
    """The grammar of these calls.

    Args:
        tokens: ids of the marks that are single tokens.
        other: the form of an answer without calls.
    """
    write = _Writer(tokens)
    several = calling.parallel and spelled.joint is not None
    more = f" ({write.text(spelled.joint or '')} call){{0,{MOST_CALLS - 1}}}" if several else ""
    lines = [
        f"calls: {write.text(spelled.first)} call{more} {write.text(spelled.last)}",
        "call: " + " | ".join(f"call_{place}" for place in range(len(calling.tools))),
    ]
    for place, tool in enumerate(calling.tools):
        function = tool["function"]
        begin, end = write.text(spelled.begin + function["name"] + spelled.middle), write.text(spelled.end)
        lines.append(f"call_{place}: {begin} arguments_{place} {end}")
        lines.append(f"arguments_{place}: {_arguments(function)}")
    if other is None:
        return Grammar("calls", "\n".join(["start: calls", *lines]), "tools")
    return Grammar("calls", "\n".join(["start: calls | other", *lines, *_form(other)]), other.param)


def calls_schema(calling: Calling, other: Grammar | None) -> Grammar:
    """The same for engines that follow JSON schemas: one call, as Llama writes it.

    Raises:
        InvalidRequestError: the other form is not a schema.
    """
    if other is not None and other.kind != "json":
        raise InvalidRequestError(f"This engine cannot combine this {other.param} with tools.", other.param)
    schemas = [_call_schema(tool["function"]) for tool in calling.tools] + ([] if other is None else [other.value])
    if len(schemas) == 1:
        return Grammar("json", _moved(schemas[0], "#"), "tools")
    return Grammar("json", {"anyOf": [_moved(each, f"#/anyOf/{n}") for n, each in enumerate(schemas)]}, "tools")


def _moved(schema: Any, place: str) -> Any:
    """The schema moved inside another, with its references adjusted."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: _moved(value, place) for key, value in schema.items()}
    refers = schema.get("$ref")
    return {**parts, "$ref": place + refers[1:]} if isinstance(refers, str) and refers.startswith("#") else parts


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _moved({"type": "object", **function["parameters"]}, "#/properties/parameters")
    parts = {"name": {"enum": [function["name"]]}, "parameters": parameters}
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def _form(form: Grammar) -> list[str]:
    """A form as the rule ``other`` and the rules it needs."""
    if form.kind == "json":
        return [f"other: {_json(form.value, form.param)}"]
    if form.kind == "regex":
        return ["other: /" + re.sub(r"\\.|/", _escaped, form.value, flags=re.DOTALL) + "/"]
    return choice_lines("other", form.value)


def _escaped(part: re.Match[str]) -> str:
    return r"\/" if part[0] == "/" else part[0]


def _arguments(function: Mapping[str, Any]) -> str:
    try:
        return _json({"type": "object", **function["parameters"]}, "tools")
    except InvalidRequestError as error:
        raise InvalidRequestError(f"The parameters of {function['name']}: {error}", "tools") from None


def _json(schema: Any, param: str) -> str:
    return "%json " + json.dumps(followable(schema, param))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Writer:
    """Writes literal text, with the marks in it as their tokens."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        marks = sorted(tokens, key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else r"(?!)")

    def text(self, text: str) -> str:
        parts = [part for part in self._marks.split(text) if part] if self._tokens else [text] if text else []
        return (
            " ".join(f"<[{self._tokens[part]}]>" if part in self._tokens else _quoted(part) for part in parts) or '""'
        )
