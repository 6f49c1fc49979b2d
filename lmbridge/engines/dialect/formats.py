"""The formats in which models call functions.

Rule: data only. Each entry says how to find calls in an answer, in the terms of transformers' response templates, and
how to write them, for answers that must be calls.

Sources: the chat templates published by the models' authors.
"""

# ruff: noqa: RUF001  DeepSeek writes its marks with a full-width bar

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Field = Mapping[str, Any]
"""A field of one of transformers' response templates."""

_BLANK = r"\s{0,9}"  # before a mark; bounded, or an answer of blanks would be rescanned endlessly
_JSON: Field = {"repeats": True, "content": "json", "content_args": {"allow_non_json": True}}
_WHOLE: Field = {**_JSON, "transform": {"call": "{content}"}}  # name and arguments are both in the JSON
_NAMED: Field = {**_JSON, "transform": {"name": "{name}", "arguments": "{content}"}}  # the name comes before it

THOUGHT: Field = {"open_pattern": r"<think>\s{0,9}", "close_pattern": _BLANK + r"</think>\s{0,9}", "content": "text"}


@dataclass(frozen=True)
class Spelled:
    """How calls are written: ``first``, then for each ``begin`` NAME ``middle`` ARGUMENTS ``end``, then ``last``.

    Attributes:
        joint: between two calls; None if only one call is possible.
    """

    begin: str
    middle: str
    end: str
    joint: str | None = None
    first: str = ""
    last: str = ""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        field: how calls are found.
        spelled: how they are written; None if the arguments are not JSON.
        marks: possible single tokens that must be kept when special tokens are left out of the text.
        around: what stood around a region that was not a call after all, with ``{name}`` for its name; "" if calls are
            not announced.
        closing: what follows the last call, at the end of the answer.
        id_length: of a call's id, without prefix; 0 if the template accepts any.
    """

    name: str
    field: Field
    spelled: Spelled | None
    marks: tuple[str, ...] = ()
    around: tuple[str, str] = ("", "")
    closing: str = ""
    id_length: int = 0


HERMES = Format(  # Hermes, Qwen 2.5 and 3, SmolLM, and many more
    "hermes",
    {**_WHOLE, "open_pattern": _BLANK + r"<tool_call>\s*", "close": "</tool_call>"},
    Spelled('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", joint="\n"),
    ("<tool_call>", "</tool_call>"),
    ("<tool_call>", "</tool_call>"),
)
QWEN_XML = Format(  # Qwen 3 Coder, Qwen 3.5
    "qwen-xml",
    {
        "open_pattern": _BLANK + r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close": ["</function>\n</tool_call>", "</function></tool_call>"],
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>(?:(?!<parameter=).)*?)\n?</parameter>"
        },
        "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
    },
    None,
    ("<tool_call>", "</tool_call>"),
    ("<tool_call>\n<function={name}>\n", "</function>\n</tool_call>"),
)
LLAMA = Format(  # Llama 3.1 and later
    "llama",
    {
        **_WHOLE,
        "open_pattern": r"(?:\A\s{0,9}(?:<\|python_tag\|>\s{0,9})?|(?<=\});\s{0,9})(?=\{)",
        "close_pattern": r"(?<=\})(?=;\s{0,9}\{)",
    },
    Spelled('{"name": "', '", "parameters": ', "}"),
    ("<|python_tag|>",),
)
MISTRAL_NAMED = Format(  # Mistral Small 3.2, Magistral, Devstral
    "mistral",
    {
        **_NAMED,
        "open_pattern": _BLANK + r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?\s*\[ARGS\]\s*",
        "close_pattern": _BLANK + r"(?=\[TOOL_CALLS\])",
    },
    Spelled("[TOOL_CALLS]", "[ARGS]", "", joint=""),
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ("[TOOL_CALLS]{name}[ARGS]", ""),
    id_length=9,
)
MISTRAL_LIST = Format(  # Mistral 7B v0.3, Nemo, Small 3
    "mistral-list",
    {**_WHOLE, "open_pattern": _BLANK + r"\[TOOL_CALLS\]\s*(?=\[)", "close_pattern": _BLANK + r"(?=\[TOOL_CALLS\])"},
    Spelled('{"name": "', '", "arguments": ', "}", joint=", ", first="[TOOL_CALLS] [", last="]"),
    ("[TOOL_CALLS]",),
    ("[TOOL_CALLS]", ""),
    id_length=9,
)
_DEEPSEEK_BEGIN = _BLANK + r"(?:<｜tool▁calls▁begin｜>\s{0,9})?<｜tool▁call▁begin｜>"
_DEEPSEEK_END = _BLANK + r"<｜tool▁call▁end｜>"
_DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip
DEEPSEEK_FENCED = Format(  # DeepSeek V3 and R1
    "deepseek-fenced",
    {
        **_NAMED,
        "open_pattern": _DEEPSEEK_BEGIN + r"function<｜tool▁sep｜>(?P<name>[\w.-]+)\s*```json\s*",
        "close_pattern": _BLANK + "```" + _DEEPSEEK_END,
    },
    Spelled(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", joint="\n",
        first="<｜tool▁calls▁begin｜>", last="<｜tool▁calls▁end｜>",
    ),
    _DEEPSEEK_MARKS,
    ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n", "\n```<｜tool▁call▁end｜>"),
    closing="<｜tool▁calls▁end｜>",
)  # fmt: skip
DEEPSEEK = Format(  # DeepSeek V3.1 and later
    "deepseek",
    {
        **_NAMED,
        "open_pattern": _DEEPSEEK_BEGIN + r"(?P<name>[\w.-]+)<｜tool▁sep｜>\s*",
        "close_pattern": _DEEPSEEK_END,
    },
    Spelled(
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", joint="",
        first="<｜tool▁calls▁begin｜>", last="<｜tool▁calls▁end｜>",
    ),
    _DEEPSEEK_MARKS,
    ("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    closing="<｜tool▁calls▁end｜>",
)  # fmt: skip

FORMATS = (HERMES, QWEN_XML, MISTRAL_NAMED, MISTRAL_LIST, DEEPSEEK_FENCED, DEEPSEEK, LLAMA)
"""The most specific first: a call in one format may look like one in a later format."""


def response_template(format: Format | None) -> dict[str, Any]:
    """The response template for transformers' parser. ``format`` None: no calls."""
    calls = {} if format is None else {"tool_calls": dict(format.field)}
    if format is not None and format.closing:
        calls["closing"] = {"open_pattern": _BLANK + re.escape(format.closing), "content": "text"}
    fields = {"reasoning_content": dict(THOUGHT), **calls, "content": {"content": "text"}}
    return {"start_anchor": "\0", "fields": fields}
