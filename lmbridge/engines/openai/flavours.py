"""What each kind of server takes beside OpenAI's own fields, and what it calls it.

Rule: data and pure functions. A field that a kind of server would not honour is in none of its lists and is refused by
name: most of them leave out without a word what they do not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmbridge.grammar import is_gbnf

Form = Callable[[Any], "dict[str, Any] | None"]
"""From what an answer must be to the fields that ask for it; None where this server cannot be asked for it."""

_OPENAI = frozenset(
    {
        "max_new_tokens", "do_sample", "temperature", "top_p", "random_seed", "stop_words", "logprobs",
        "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "grammar", "tools", "tool_choice",
        "parallel_tool_calls", "separate_reasoning",
    }
)  # fmt: skip
"""GenerationConfig's fields that OpenAI's API has words for; ``asking`` says them."""
CHAT_ONLY = frozenset(
    {
        "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt",
        "continue_final_message", "separate_reasoning",
    }
)  # fmt: skip
"""Those that say something of a conversation, and nothing of a text."""


@dataclass(frozen=True)
class Flavour:
    """One kind of server.

    Attributes:
        owner: how its models are said to be ``owned_by``.
        names: fields that are passed on as they are, to what they are called there.
        forms: what kinds of grammar it follows.
        lacks: fields of OpenAI's that it ignores.
        chat_only: fields that only its chats take, beside those that are no others' either.
        max_tokens: what it calls a chat's ``max_new_tokens``.
        formats: it takes ``response_format`` as OpenAI does.
        tells_ids: it gives token ids, with ``return_token_ids``.
        tells_ending: among them is the one that ended the answer.
        names_tools: its ``tool_choice`` may be one tool's name.
        embeds: what it takes beside OpenAI's fields of ``/embeddings``.
        truncates: what asks it to cut the end off a text that is too long, to embed or to rerank.
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
        """The fields of GenerationConfig that it honours."""
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
"""What some of them honour; which one it is, is known once a server has answered."""


def flavour_of(owner: object) -> Flavour:
    """The kind of server whose models are said to be owned by that; one that is not known takes OpenAI's fields."""
    named = str(owner).lower()
    return next((found for found in FLAVOURS.values() if found.owner.lower() == named), _PLAIN)


_PLAIN = Flavour("a server", forms={"json": _schema}, chat_only=frozenset({"response_format", "grammar"}))
"""What speaks OpenAI's API and is not known here: its chats may know no newer name of ``max_tokens``."""
