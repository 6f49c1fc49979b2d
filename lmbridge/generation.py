"""How to generate: the caller's settings, validated and converted to plain values.

Rule: plain data, any thread; no engine is known here. Each engine declares which fields it supports.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lmbridge.errors import InvalidRequestError
from lmbridge.grammar import Grammar, read_grammar
from lmbridge.tools import MOST_TOOLS, TOOL_CHOICES, Calling, read_calling, read_choice, read_tools
from lmbridge.values import as_flag, as_int, as_list, as_number

_OPENAI_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "random_seed",
    "stop": "stop_words",
    "top_logprobs": "logprobs",
}
_TEMPLATE_NAMES = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "self",
    "tokenize", "tokenizer_kwargs", "truncation",
)  # fmt: skip
"""Reserved names: as template variables they would change how the prompt is rendered."""
_MOST_BIASES = 1024
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "random_seed")


class Overrides(TypedDict, total=False):
    """The fields of GenerationConfig as keyword arguments of the verbs: ``bridge.infer(prompt, temperature=0.7)``."""

    max_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    random_seed: int | None
    stop_words: list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int | None
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] | None
    min_new_tokens: int | None
    include_stop_str_in_output: bool
    truncate_prompt_tokens: int | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    prompt_logprobs: int | None
    return_prompt_token_ids: bool
    response_format: Mapping[str, Any] | type | None
    grammar: str | Mapping[str, Any] | type | None
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    separate_reasoning: bool


@dataclass
class GenerationConfig:
    """How to generate. Mutable, and copied when a request is submitted.

    Numbers, flags and lists may come from numpy, torch, or any type registered with Python's ``numbers``; engines get
    plain ones.

    Attributes:
        max_new_tokens: the most tokens to generate, >= 1. The model's context may end generation earlier.
        do_sample: True samples, False takes the most likely token; None samples when one of temperature, top_p,
            top_k, min_p or random_seed is given and otherwise decodes greedily.
        temperature: >= 0; 0 is greedy.
        top_p: keep the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep the k most likely tokens, >= 1 (0 keeps all).
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: > 0; above 1 makes tokens of the prompt and answer less likely.
        random_seed: the same seed gives the same text, whatever else is in the batch.
        stop_words: strings that end the answer; excluded from it unless ``include_stop_str_in_output``.
        stop_token_ids: token ids that end the answer, in addition to the model's own.
        ignore_eos: continue past the model's own end-of-sequence tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: per generated token, its log-probability and those of this many most likely tokens.
        frequency_penalty: from -2 to 2; subtracted from a token's score for each time the answer already has it.
        presence_penalty: from -2 to 2; subtracted once from the score of each token that the answer already has.
        logit_bias: maps token ids to a bias added to their score, from -100 to 100; at most 1024 entries. The model's
            own end-of-sequence tokens are allowed.
        min_new_tokens: until this many tokens, suppress end-of-sequence tokens and ``stop_token_ids``, and ignore stop
            words; at most ``max_new_tokens``.
        include_stop_str_in_output: keep the stop word that ended the answer.
        truncate_prompt_tokens: read only this many last tokens of the prompt, >= 1.
        chat_template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.
        add_generation_prompt: end a conversation with the start of the model's answer; None: True unless
            ``continue_final_message``.
        continue_final_message: let the model continue the last message of the conversation.
        prompt_logprobs: per prompt token except the first, its log-probability and those of this many most likely
            tokens, from 0 to 20.
        return_prompt_token_ids: return the prompt's token ids; ``prompt_logprobs`` returns them too.
        response_format: the form of the answer, as in OpenAI's API: ``{"type": "json_schema", "json_schema": {"schema":
            …}}``, ``{"type": "json_object"}`` or ``{"type": "text"}``. Only tokens that fit are chosen; an answer cut
            off by ``max_new_tokens`` or a stop word is incomplete. A class, such as a pydantic model, stands for its
            schema.
        grammar: the same, as ``{"json": schema}``, ``{"regex": "…"}``, ``{"choice": ["…", …]}`` or ``{"lark": "…"}``; a
            string is a Lark grammar. llama.cpp's notation (GBNF) is accepted too.
        tools: at most 128 functions that the model may call, in OpenAI's form or as Python functions with type hints
            and docstrings. ``Response.tool_calls`` has the calls.
        tool_choice: ``"auto"`` (the default) lets the model decide, ``"required"`` forces at least one call, ``"none"``
            hides the tools, and ``{"type": "function", "function": {"name": "…"}}`` forces a call of that function.
        parallel_tool_calls: allow several calls in one answer.
        separate_reasoning: return a reasoning model's thoughts separately, as ``Response.reasoning``; always on with
            ``tools``.
    """

    max_new_tokens: int = 512
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    random_seed: int | None = None
    stop_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_new_tokens: int | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    prompt_logprobs: int | None = None
    return_prompt_token_ids: bool = False
    response_format: Mapping[str, Any] | type | None = None
    grammar: str | Mapping[str, Any] | type | None = None
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = False

    def __new__(cls, *args: object, **fields: object) -> GenerationConfig:
        _refuse_unknown(fields)
        return super().__new__(cls)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random rather than taken by highest probability."""
        if self.temperature == 0 or self.top_k == 1:
            return False
        if self.do_sample is None:
            return any(getattr(self, name) is not None for name in _SAMPLING_FIELDS)
        return self.do_sample

    @property
    def form(self) -> Grammar | None:
        """The form the answer must have; None if any will do.

        Raises:
            InvalidRequestError: ``response_format`` or ``grammar`` is malformed, or both are given.
        """
        if self.response_format is None and self.grammar is None:
            return None
        return read_grammar(self.response_format, self.grammar)

    @property
    def calling(self) -> Calling | None:
        """What the answer may or must call; None if it must not call anything.

        Raises:
            InvalidRequestError: tools or tool_choice are malformed or contradict each other.
        """
        if self.tools is None and self.tool_choice is None:
            return None
        tools = None if self.tools is None else read_tools(self.tools)
        choice = None if self.tool_choice is None else read_choice(self.tool_choice)
        return read_calling(tools, choice, self.parallel_tool_calls)

    def merged(self, overrides: Overrides) -> GenerationConfig:
        """A validated copy with ``overrides`` applied; it holds plain values and shares no lists.

        Raises:
            InvalidRequestError: a field is unknown, of the wrong type or out of range, or contradicts another.
        """
        _refuse_unknown(overrides)
        merged = object.__new__(type(self))
        fields = merged.__dict__
        fields.update(self.__dict__, **overrides)
        for name, default in _DEFAULTS.items():
            value = fields[name]
            if value is not default:  # by identity: 512.0 and numpy's 512 compare equal to the default
                fields[name] = _checked(name, value)
        merged._check_together()
        return merged

    def check(self) -> None:
        """Raise InvalidRequestError, naming the field, if a field has the wrong type or is out of range."""
        self.merged({})

    def _check_together(self) -> None:
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            least, most = self.min_new_tokens, self.max_new_tokens
            raise InvalidRequestError(
                f"min_new_tokens must be at most max_new_tokens, which is {most}, not {least}.", param="min_new_tokens"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message continues the last message, add_generation_prompt begins another: give one of "
                "them.",
                param="continue_final_message",
            )

        form, calling = self.form, self.calling
        if form is not None and calling is not None and calling.required:
            raise InvalidRequestError(f"tool_choice forces a call and {form.param} another form: give one.", form.param)
        if calling is not None and calling.required and (self.ignore_eos or self.min_new_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_new_tokens"
            raise InvalidRequestError(f"{name} would continue the answer after its calls: remove it.", name)
        if form is not None and (self.ignore_eos or self.min_new_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_new_tokens"
            raise InvalidRequestError(f"{name} would continue the answer beyond its {form.param}: give one.", name)

    def given(self) -> list[str]:
        """The names of the fields that differ from their defaults."""
        fields = self.__dict__
        if fields == _DEFAULTS:
            return []
        return [name for name, value in fields.items() if value != _DEFAULTS.get(name)]


def _refuse_unknown(fields: Any) -> None:
    for name in fields:
        if name in _FIELD_NAMES:
            continue
        known = _OPENAI_NAMES.get(name)
        hint = f"use {known}" if known else f"the fields are {', '.join(_FIELD_NAMES)}"
        raise InvalidRequestError(f"GenerationConfig has no field {name!r}: {hint}.", param=name)


def _checked(name: str, value: object) -> object:
    """The field's value, converted to a plain one."""
    read, expected = _KINDS[name]
    plain = read(value)
    if plain is None:
        raise InvalidRequestError(f"{name} must be {expected}, not {reprlib.repr(value)}.", param=name)
    return plain


def _int(low: int, high: float = math.inf) -> _Reader:
    def read(value: object) -> int | None:
        number = as_int(value)
        return number if number is not None and low <= number <= high else None

    return read


def _number(low: float, high: float = sys.float_info.max, above: bool = False) -> _Reader:
    """A reader for numbers from ``low`` (exclusive if ``above``) to ``high``; infinity and nan are refused."""

    def read(value: object) -> float | None:
        number = as_number(value)
        return number if number is not None and low <= number <= high and not (above and number == low) else None

    return read


def _texts(value: object) -> list[str] | None:
    texts = as_list(value)
    return list(texts) if texts is not None and all(isinstance(text, str) and text for text in texts) else None


def _ints(value: object) -> list[int] | None:
    numbers = as_list(value)
    if numbers is None:
        return None
    plain = [number for number in map(as_int, numbers) if number is not None]
    return plain if len(plain) == len(numbers) else None


def _biases(value: object) -> dict[int, float] | None:
    if not isinstance(value, Mapping) or len(value) > _MOST_BIASES:
        return None
    bias = _number(-100, 100)
    plain = {as_int(token): bias(number) for token, number in value.items()}
    tokens = [token for token in plain if token is not None and token >= 0]
    good = len(tokens) == len(plain) and None not in plain.values()
    return plain if good else None  # type: ignore[return-value]


def _form(value: object) -> object:
    """A copy that the caller cannot change; ``form`` reads it."""
    try:
        return copy.deepcopy(dict(value)) if isinstance(value, Mapping) else value
    except Exception:  # the value cannot be in a schema
        return None


def _variables(value: object) -> dict[str, Any] | None:
    """The template's variables; reserved names are refused."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return None
    for name in value:
        if name in _TEMPLATE_NAMES:
            raise InvalidRequestError(
                f"chat_template_kwargs cannot set {name!r}, which is not a variable of the template. Leave it out.",
                param="chat_template_kwargs",
            )
    return dict(value)


_Reader = Callable[[object], object]
"""Returns the plain value, or None if the given one is invalid."""
_FIELD_NAMES: dict[str, None] = {}  # filled below, once the class exists
# What each field accepts; "or None" stands where None is the default.
_KINDS: dict[str, tuple[_Reader, str]] = {
    "max_new_tokens": (_int(1), "an int >= 1"),
    "do_sample": (as_flag, "True, False or None"),
    "temperature": (_number(0), "a number >= 0 or None"),
    "top_p": (_number(0, 1, above=True), "a number in (0, 1] or None"),
    "top_k": (_int(0), "an int >= 0 or None"),
    "min_p": (_number(0, 1), "a number in [0, 1] or None"),
    "repetition_penalty": (_number(0, above=True), "a number > 0 or None"),
    "random_seed": (_int(0), "an int >= 0 or None"),
    "stop_words": (_texts, "a list of non-empty strings, or None"),
    "stop_token_ids": (_ints, "a list of ints or None"),
    "ignore_eos": (as_flag, "True or False"),
    "skip_special_tokens": (as_flag, "True or False"),
    "logprobs": (_int(0, 20), "an int from 0 to 20 or None"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "logit_bias": (_biases, f"a dict of at most {_MOST_BIASES} token ids to numbers from -100 to 100, or None"),
    "min_new_tokens": (_int(0), "an int >= 0 or None"),
    "include_stop_str_in_output": (as_flag, "True or False"),
    "truncate_prompt_tokens": (_int(1), "an int >= 1 or None"),
    "chat_template_kwargs": (_variables, "a dict of names to values, or None"),
    "add_generation_prompt": (as_flag, "True, False or None"),
    "continue_final_message": (as_flag, "True or False"),
    "prompt_logprobs": (_int(0, 20), "an int from 0 to 20 or None"),
    "return_prompt_token_ids": (as_flag, "True or False"),
    "response_format": (_form, "a dict, a class or None"),
    "grammar": (_form, "a string, a dict, a class or None"),
    "tools": (read_tools, f"a list of at most {MOST_TOOLS} tools, or None"),
    "tool_choice": (read_choice, f"{TOOL_CHOICES}, or None"),
    "parallel_tool_calls": (as_flag, "True or False"),
    "separate_reasoning": (as_flag, "True or False"),
}
_FIELD_NAMES.update(dict.fromkeys(f.name for f in dataclasses.fields(GenerationConfig)))
_DEFAULTS: dict[str, object] = {}
_DEFAULTS.update(GenerationConfig().__dict__)
