"""The fields of each kind of server beyond OpenAI's, and their names.

Rule: data and pure functions. A field that a kind of server does not support is in none of its lists and is refused by
name: most servers silently ignore unknown fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmbridge.grammar import is_gbnf

Form = Callable[[Any], "dict[str, Any] | None"]
"""Maps the form of an answer to request fields; None if this server does not support it."""

_OPENAI = frozenset(
    {
        "max_new_tokens", "do_sample", "temperature", "top_p", "random_seed", "stop_words", "logprobs",
        "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "grammar", "tools", "tool_choice",
        "parallel_tool_calls", "separate_reasoning",
    }
)  # fmt: skip
"""GenerationConfig fields that OpenAI's API has; ``asking`` translates them."""
CHAT_ONLY = frozenset(
    {
        "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt",
        "continue_final_message", "separate_reasoning",
    }
)  # fmt: skip
"""Fields that apply to conversations only."""


@dataclass(frozen=True)
class Flavour:
    """One kind of server.

    Attributes:
        owner: the ``owned_by`` of its models.
        names: maps fields passed on unchanged to their names there.
        forms: the kinds of grammar it supports.
        lacks: OpenAI fields that it ignores.
        chat_only: further fields that only its chat route supports.
        max_tokens: its name for a chat's ``max_new_tokens``.
        formats: it supports ``response_format`` like OpenAI.
        tells_ids: it returns token ids, with ``return_token_ids``.
        tells_ending: they include the end token.
        names_tools: its ``tool_choice`` may be one tool's name.
        embeds: its fields of ``/embeddings`` beyond OpenAI's.
        truncates: the field that makes it cut texts that are too long to embed or rerank.
    """

    owner: str
    names: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    chat_only: frozenset[str] = frozenset()
    max_tokens: str = "max_tokens"
    formats: bool = True
    tells_ids: bool = False
    tells_ending: bool = False
    names_tools: bool = True
    embeds: frozenset[str] = frozenset()
    truncates: Mapping[str, Any] = field(default_factory=dict)

    @property
    def supports(self) -> frozenset[str]:
        """The fields of GenerationConfig that it supports."""
        ids = {"return_prompt_token_ids"} if self.tells_ids else set()
        return frozenset((_OPENAI | self.names.keys() | ids) - self.lacks)


def _schema(schema: Any) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _structured(kind: str) -> Form:
    return lambda value: {"structured_outputs": {kind: list(value) if kind == "choice" else value}}


def _alternatives(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, texts))


def _regex_schema(pattern: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex_schema", "regex_schema": pattern}}


def _gbnf(text: str) -> dict[str, Any] | None:
    return {"grammar": text} if is_gbnf(text) else None


def _gbnf_choice(texts: Sequence[str]) -> dict[str, Any]:
    return {"grammar": f"root ::= {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_COMMON = ("top_k", "min_p", "ignore_eos")
_VLLM_NAMES = {
    **_same(
        *_COMMON, "repetition_penalty", "stop_token_ids", "skip_special_tokens", "include_stop_str_in_output",
        "truncate_prompt_tokens", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    ),
    "min_new_tokens": "min_tokens",
}  # fmt: skip
_VLLM_FORMS: dict[str, Form] = {
    "json": _schema,
    "regex": _structured("regex"),
    "choice": _structured("choice"),
    "lark": _structured("grammar"),
}

FLAVOURS: dict[str, Flavour] = {
    "lmbridge": Flavour(
        "lmbridge",
        _VLLM_NAMES,
        _VLLM_FORMS,
        tells_ids=True,
        embeds=frozenset({"normalize", "prompt"}),
        truncates={"truncate": "end"},
    ),
    "vllm": Flavour(
        "vllm", _VLLM_NAMES, _VLLM_FORMS, tells_ids=True, tells_ending=True, truncates={"truncate_prompt_tokens": -1}
    ),
    "lmdeploy": Flavour(
        "lmdeploy",
        _same(
            *_COMMON, "repetition_penalty", "skip_special_tokens", "min_new_tokens", "include_stop_str_in_output",
            "chat_template_kwargs",
        ),
        {
            "json": _schema,
            "regex": _regex_schema,
            "choice": lambda texts: _regex_schema(_alternatives(texts)),
        },
        chat_only=frozenset(
            {"logit_bias", "response_format", "grammar", "min_new_tokens", "include_stop_str_in_output"}
        ),
    ),
    "tabbyapi": Flavour(
        "tabbyAPI",
        {
            **_same(*_COMMON, "repetition_penalty", "skip_special_tokens"),
            "min_new_tokens": "min_tokens",
            "chat_template_kwargs": "template_vars",
        },
        {
            "json": lambda schema: {"json_schema": schema},
            "regex": lambda pattern: {"regex_pattern": pattern},
            "choice": lambda texts: {"regex_pattern": _alternatives(texts)},
        },
        lacks=frozenset({"random_seed", "logprobs"}),
        formats=False,
    ),
    "llamacpp": Flavour(
        "llamacpp",
        {**_same(*_COMMON, "chat_template_kwargs"), "repetition_penalty": "repeat_penalty"},
        {"json": lambda schema: {"json_schema": schema}, "lark": _gbnf, "choice": _gbnf_choice},
        formats=False,
        names_tools=False,
    ),
    "openai": Flavour(
        "openai",
        forms={"json": _schema},
        chat_only=frozenset({"response_format", "grammar"}),
        max_tokens="max_completion_tokens",
    ),
}  # fmt: skip

ANY = frozenset[str]().union(*(flavour.supports for flavour in FLAVOURS.values()))
"""The fields that at least one kind supports; the kind is known once a server has answered."""


def flavour_of(owner: object) -> Flavour:
    """The kind of server whose models have this ``owned_by``; an unknown kind gets OpenAI's fields."""
    named = str(owner).lower()
    return next((found for found in FLAVOURS.values() if found.owner.lower() == named), _PLAIN)


_PLAIN = Flavour("a server", forms={"json": _schema}, chat_only=frozenset({"response_format", "grammar"}))
"""Unknown servers with OpenAI's API: their chats may lack the newer name of ``max_tokens``."""
